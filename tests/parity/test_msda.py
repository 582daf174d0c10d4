"""One multi-scale deformable attention with point and with box references: outputs and every gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motip.model import deformable_attention
from motip.model.deformable_attention import DeformableAttention
from tests.parity.recipe import fill
from tests.parity.sizes import largest_difference, reference_files, tensor


@pytest.mark.parametrize("implementation", ["grid_sample", "embedding_bag"])
@pytest.mark.parametrize("prefix", ["r2_", "r4_"])
@pytest.mark.parametrize("path", reference_files("msda*.npz"))
def test_deformable_attention_matches(
    path: Path, prefix: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deformable_attention, "_chosen", implementation)
    with np.load(path) as file:
        module = DeformableAttention(
            int(file["d_model"]), int(file["n_levels"]), int(file["n_heads"]), int(file["n_points"])
        )
        fill(module, int(file["salt"]), "msda.")
        query = tensor(file[prefix + "query"]).requires_grad_()
        value_in = tensor(file[prefix + "value_in"]).requires_grad_()
        shapes = [(int(h), int(w)) for h, w in file["spatial_shapes"]]
        out = module(query, tensor(file[prefix + "ref"]), value_in, shapes, tensor(file[prefix + "mask"]))
        out.backward(tensor(file[prefix + "grad_out"]))

        assert largest_difference(out, file[prefix + "out"]) < 1e-5
        assert largest_difference(query.grad, file[prefix + "grad_query"]) < 1e-4
        assert largest_difference(value_in.grad, file[prefix + "grad_value_in"]) < 1e-4
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(parameter.grad, file[f"{prefix}grad_{name}"], rtol=1e-4, atol=1e-4, err_msg=name)
