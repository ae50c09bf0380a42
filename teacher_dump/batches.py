"""Which samples go through the teacher together: length-sorted, under a budget of padded tokens."""

from collections.abc import Sequence


def length_sorted_batches(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Cut samples into batches in which little is padded.

    The longest come first, so that memory runs out in the first batch or never.

    Args:
        lengths: tokens of each sample.
        budget: a batch's samples times its longest sample stay within it; a longer sample goes alone.

    Returns:
        Places in `lengths`; each exactly once.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(place)
    return batches
