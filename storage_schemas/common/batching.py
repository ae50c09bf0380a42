"""Which samples go through a model together: length-sorted, under a budget of padded tokens."""

from collections.abc import Sequence


def length_sorted_batches(
    lengths: Sequence[int], *, budget: int, apart_at: int | None = None, ways: int = 1
) -> list[list[int]]:
    """Cut samples into batches in which little is padded.

    The longest come first, so that memory runs out in the first batch or never.

    Args:
        budget: a batch's samples times its longest sample stay within it; a longer sample goes alone.
        apart_at: samples up to this length never share a batch with longer ones.
        ways: how many share a batch, each taking every so many of its samples: the budget is that of each.

    Returns:
        Places in `lengths`; each exactly once.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        apart = apart_at is not None and lengths[place] <= apart_at < longest
        if not batches or apart or len(batches[-1]) >= ways * max(1, budget // longest):
            batches.append([])
        batches[-1].append(place)
    return batches
