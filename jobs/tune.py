"""python -m jobs.tune ...: see --help."""

import sys

from jobs._main import INPUT_ERROR, run
from pipeline.errors import PipelineError
from pipeline.search.arguments import translate
from pipeline.search.run import tune

if __name__ == "__main__":
    try:
        arguments = translate(sys.argv[1:])
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_ERROR)
    run("tune", tune, arguments)
