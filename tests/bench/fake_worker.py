"""The worker of a benchmark on fakes: it opens what the function of rows.py named by KDC_EDGE_TEST_OPENER gives."""

import os

from kdc_edge.bench import worker
from tests.bench import rows

worker.open_for_bench = getattr(rows, os.environ["KDC_EDGE_TEST_OPENER"])
worker.main()
