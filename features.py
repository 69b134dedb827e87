"""Fill the embedding cache of a data set ahead of training: `python3 features.py --help`.

The folder features/ has the code, and Python takes `import features` for that.
"""

from features.settings import get_args_parser
from utils.flags import flags_first
from utils.process import run

flags_first(__name__, get_args_parser)

from features.fill import main

if __name__ == "__main__":
    run(main)
