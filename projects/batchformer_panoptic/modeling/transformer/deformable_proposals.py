"""The first stage of two-stage Deformable-DETR: proposals from the encoder's memory.

Shapes: B' = streams * B, N tokens of all levels, Q queries, K class logits, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...layers import sine_encoding
from .base import BoxPredictor, Proposals
from .deformable_levels import Levels

_BASE_SIZE = 0.05  # side of a proposal on the finest level; doubles from level to level
_MARGIN = 0.01  # a token this close to the edge of the image proposes nothing


class FirstStage(NamedTuple):
    """What the decoder starts from, and what is supervised.

    Attributes:
        queries: (B', Q, C) content of the queries.
        query_pos: (B', Q, C) their positions.
        references: (B', Q, 4) boxes as logits, without gradient.
        proposals: of all tokens.
    """

    queries: Tensor
    query_pos: Tensor
    references: Tensor
    proposals: Proposals


class ProposalStage(nn.Module):
    """Every token proposes a box around itself; the best become the queries (appendix A.4).

    As published, a proposal is as good as its logit of class 0, since proposals are trained with
    that class for every object, and tokens at the edge or in the padding have boxes of all ones.
    Parameter names are those of fundamentalvision/Deformable-DETR.

    Args:
        embed_dim: channels C.
        num_queries: proposals Q that go on to the decoder.
        head_layer: what ``BoxPredictor.predict_layer`` calls the head of the proposals.
    """

    def __init__(self, *, embed_dim: int, num_queries: int, head_layer: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.head_layer = head_layer
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        self.pos_trans = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.pos_trans_norm = nn.LayerNorm(2 * embed_dim)

    def forward(self, memory: Tensor, levels: Levels, box_head: BoxPredictor) -> FirstStage:
        """Propose.

        Args:
            memory: (B', N, C).
            levels: of the memory.
            box_head: the head that also reads the decoder.

        Raises:
            UserError: the image has fewer tokens than there are to be queries.
        """
        if memory.shape[1] < self.num_queries:
            raise UserError(
                f"MODEL.DETR.NUM_OBJECT_QUERIES is {self.num_queries}, but a batch has only "
                f"{memory.shape[1]} tokens to propose boxes: use fewer queries or larger images"
            )
        starts, usable = token_boxes(levels)
        states = memory.masked_fill(~usable[..., None], 0.0)
        states = self.enc_output_norm(self.enc_output(states))
        logits, boxes = box_head.predict_layer(self.head_layer, states, starts)
        best = logits[..., 0].topk(self.num_queries, dim=1).indices
        references = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        where = sine_encoding(references.sigmoid(), 2 * memory.shape[-1])
        query_pos, queries = self.pos_trans_norm(self.pos_trans(where)).chunk(2, dim=-1)
        return FirstStage(queries, query_pos, references, Proposals(logits, boxes.sigmoid()))


def token_boxes(levels: Levels) -> tuple[Tensor, Tensor]:
    """The box that each token starts from.

    Returns:
        (B', N, 4) float32 logits of cxcywh, infinite where a token proposes nothing, and (B', N)
        bool, True where it proposes something.
    """
    sizes = torch.cat(
        [
            levels.centers.new_full((height * width, 1), _BASE_SIZE * 2.0**level)
            for level, (height, width) in enumerate(levels.shapes)
        ]
    )
    boxes = torch.cat([levels.centers, sizes.expand_as(levels.centers)], dim=-1)
    # Centres in the padding lie beyond 1.
    usable = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1)
    return boxes.logit().masked_fill(~usable[..., None], torch.inf), usable
