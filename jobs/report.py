"""python -m jobs.report [readme | reproduction | pages | campaign | cross_table | clustering | embeddings] ...

See --help.
"""

from jobs._main import run
from pipeline.report.analysis import report

if __name__ == "__main__":
    run("report", report, word="what")
