"""Progress bars on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the context is open.

    Args:
        title: The bar's label.

    Yields:
        `Callable`: A function of the number of finished items and their total.
    """
    with tqdm(desc=title) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
