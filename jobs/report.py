"""python -m jobs.report [readme | reproduction | pages | cross_table | clustering | embeddings] ...: see --help."""

from jobs._main import run
from pipeline.report.analysis import report

if __name__ == "__main__":
    run("report", report, word="what")
