import pytest
import torch

from batchformer_panoptic.batchformer import BATCHFORMER, ORIGINAL, StreamState
from batchformer_panoptic.batchformer.batchformer import SINGLE, TWO_STREAMS


def test_original_stream_comes_first():
    assert SINGLE.names == (ORIGINAL,)
    assert TWO_STREAMS.names == (ORIGINAL, BATCHFORMER)


@pytest.mark.parametrize("streams", [SINGLE, TWO_STREAMS])
def test_expand_then_split_is_the_identity(streams):
    x = torch.randn(3, 2, 4)
    parts = streams.split(streams.expand(x))
    assert len(parts) == streams.num_streams
    for part in parts:
        assert torch.equal(part, x)
    assert torch.equal(streams.join(parts), streams.expand(x))


def test_one_stream_copies_nothing():
    x = torch.randn(3, 2)
    assert SINGLE.expand(x) is x
    assert SINGLE.join([x]) is x


def test_expand_goes_stream_after_stream():
    x = torch.tensor([[1, 2], [3, 4]])
    assert TWO_STREAMS.expand(x).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert TWO_STREAMS.expand_list(["a", "b"]) == ["a", "b", "a", "b"]
    assert TWO_STREAMS.image_of(torch.arange(4), 2).tolist() == [0, 1, 0, 1]


def test_losses_are_summed_by_stream():
    losses = TWO_STREAMS.sum_losses({"loss_ce": torch.tensor([1.0, 2, 10, 20])})
    assert {k: v.item() for k, v in losses.items()} == {
        "loss_ce/original": 3.0,
        "loss_ce/batchformer": 30.0,
    }
    assert SINGLE.sum_losses({"loss_ce": torch.tensor([1.0, 2])})["loss_ce"].item() == 3.0


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 entries do not split into 2 streams"):
        TWO_STREAMS.split(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="1 parts for 2 streams"):
        StreamState(("a", "b")).join([torch.zeros(1)])
