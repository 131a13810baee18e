"""A resident pipeline behind a page and an HTTP interface (kdc-edge serve; extra `serve`: starlette and uvicorn).

worker.py makes images one after the other on a thread of its own, app.py is the HTTP side, page.html the page.
"""
