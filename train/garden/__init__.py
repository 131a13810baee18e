"""The built-in data set: procedural scenes, the judge that reads them, the recipe of the teacher."""
