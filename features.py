"""Fill the embedding cache of a data set ahead of training: `python3 features.py --help`.

The folder features/ has the code, and Python takes `import features` for that.
"""

from features.fill import main
from utils.process import run

if __name__ == "__main__":
    run(main)
