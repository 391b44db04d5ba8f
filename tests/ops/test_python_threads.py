"""Several Python threads at once: each call has its own memory."""

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
from checks import evaluate, same_bits


@pytest.mark.parametrize("variant", cases.PUBLIC_VARIANTS)
def test_calls_at_once(native_backend, variant):
    operator, options = cases.PUBLIC_VARIANTS[variant]
    sizes = [(5, 4), (16, 16), (9, 31), (2, 3)]
    draws = [cases.make(operator, **{**options, "channels": 16, "size": size}) for size in sizes]
    alone = [evaluate(operator, cases.public(operator), arguments) for arguments in draws]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda arguments: evaluate(operator, cases.public(operator), arguments), draws)
            for mine, right in zip(together, alone, strict=True):
                assert same_bits(mine, right)
