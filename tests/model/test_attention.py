import pytest
from helpers import examples_of, random_bloom

from prefix_tuning.model import attention
from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import label_losses


@pytest.mark.parametrize(
    "lengths, form", [([47, 48], "padded"), ([48, 48], "rows"), ([90, 7], "rows"), ([90, 7, 9], "padded"), ([47], "padded")]
)
def test_on_a_cpu_rows_that_are_long_on_average_go_one_by_one(monkeypatch, lengths, form):
    called = []
    for name in ("padded", "rows"):
        real = getattr(attention, f"attend_{name}")
        monkeypatch.setattr(attention, f"attend_{name}", lambda *x, n=name, real=real: called.append(n) or real(*x))
    (batch,) = pack(examples_of(lengths), 1000)
    label_losses(random_bloom(n_layer=1), batch, None)
    assert called == [form]
