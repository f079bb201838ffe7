"""The train command for launchers: `accelerate launch -m sdllava.train --config RECIPE`."""

import sys
from collections.abc import Sequence

from .recipe_loading import find_config


def main(arguments: Sequence[str]) -> None:
    """Check the recipe's name, then load the training libraries and train."""
    find_config(arguments)
    from .run import train

    train(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
