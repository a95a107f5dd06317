"""Counting multiply-adds of a model, the fused operators included that fvcore does not know."""

import math
from typing import Any

from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn


def flop_analysis(model: nn.Module, batch: list[dict[str, Any]]) -> FlopCountAnalysis:
    """Detectron2's analysis of ``model(batch)``, fused attention and sampling counted as well."""
    analysis = FlopCountAnalysis(model, batch)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    analysis.set_op_handle("aten::embedding_bag", _weighted_sum_flops)
    # Tracing a model whose output depends on its input warns on every branch.
    analysis.tracer_warnings("none")
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def _attention_flops(inputs: list[Any], _outputs: list[Any]) -> int:
    """Multiply-adds of both matrix products: queries (..., L, E), keys (..., S, E)."""
    query, key = get_shape(inputs[0]), get_shape(inputs[1])
    return 2 * math.prod(query) * key[-2]


def _weighted_sum_flops(inputs: list[Any], _outputs: list[Any]) -> int:
    """Deformable attention: each index adds a row of the table (rows, channels), weighted."""
    table, indices = get_shape(inputs[0]), get_shape(inputs[1])
    return math.prod(indices) * table[-1]
