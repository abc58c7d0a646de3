"""A real Llama trained over ranks, together with everything else that a training step is made of: the numbers of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import over_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dilcompile import distributed

MESH = {"dp": 2, "cp": 2}
LENGTH = 14
# Which batch rows belong to which step's micro-batches; of each the first half is for the first rank of dp.
WHOLE, MICRO = (0, 8), ((0, 4), (4, 8))


def _model(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, use_cache=False, attn_implementation="sdpa", initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


@cache
def _batch() -> tuple[Tensor, Tensor]:
    """Tokens, and labels that are spread unevenly over rows and over the sequence."""
    torch.manual_seed(1)
    ids = torch.randint(32, (8, LENGTH))
    labels = ids.clone()
    labels[0, 3:], labels[1, 1:], labels[5, :9], labels[7] = -100, -100, -100, -100
    return ids, labels


def _compiler(order: str = "contiguous", method: str = "auto") -> dict[str, Any]:
    rule = {"name": "all", "apply": {"form": "keep"}, "shard": {"mesh": "cp", "method": method}}
    policy = {"version": 1, "mesh": {"cp": {"size": 2, "layout": order}}, "rules": [rule]}
    return {"backend": "dilated", "options": {"policy": policy, "inner": "eager"}}


def _shard(rows: tuple[int, int], order: str, dp: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """This rank's part of some rows of the batch, and its labels."""
    start, stop = rows
    if dp:
        half, number = (stop - start) // 2, dist.get_rank() // 2
        start, stop = start + number * half, start + (number + 1) * half
    ids, labels = (x[start:stop] for x in _batch())
    shard = distributed.shard_inputs({"input_ids": ids, "labels": labels}, order=order, is_causal=True)
    return shard, shard.pop("labels")


def _step(model: nn.Module, order: str = "contiguous", axis: Any = ("dp", "cp")) -> Tensor:
    """One backward over the whole batch."""
    shard, labels = _shard(WHOLE, order, dp="dp" in axis)
    loss = distributed.sharded_loss(model(**shard).logits, labels, axis=axis)
    loss.backward()
    return loss.detach()


def _grads(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in model.named_parameters()
    }


def _ddp(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """DDP over all ranks, then two micro-batches of which only the second synchronizes."""
    model = _model()
    model.compile(**_compiler())
    parallel = DistributedDataParallel(model)
    loss = _step(parallel)
    found = {"ddp": (loss, _grads(parallel))}
    parallel.zero_grad()
    micro = [_shard(rows, "contiguous") for rows in MICRO]
    items = distributed.count_tokens([labels for _, labels in micro], axis=("dp", "cp"))
    losses = []
    for number, (shard, labels) in enumerate(micro):
        with parallel.no_sync() if number == 0 else nullcontext():
            part = distributed.sharded_loss(parallel(**shard).logits, labels, axis=("dp", "cp"), num_items_in_batch=items)
            part.backward()
        losses.append(part.detach())
    return {**found, "accumulated": (sum(losses), _grads(parallel))}


def _fsdp(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """FSDP2 over all ranks, the model as one unit; tokens in zigzag order, activation checkpoints; saved after a step."""
    model = _model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    fully_shard(model, mesh=mesh["dp", "cp"]._flatten("dp_cp"))
    model.compile(**_compiler("zigzag", "ring"))
    found = {"fsdp, checkpointed": (_step(model, "zigzag"), _grads(model))}
    optimizer = _optimizer(model)
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return found


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)


def _fsdp_by_layer(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """FSDP2 with a unit a layer: the layers are compiled one by one."""
    model = _model()
    flat = mesh["dp", "cp"]._flatten("dp_cp_layers")
    for layer in model.model.layers:
        layer.compile(**_compiler())
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    return {"fsdp by layer": (_step(model), _grads(model))}


def _tensor_parallel(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """Tensor parallel x context parallel, and FSDP2 over the ranks of the latter. Attention itself is compiled: it holds no DTensor."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    distributed.set_mesh(grid)
    AttentionInterface.register("sharded", torch.compile(sdpa_attention_forward, **_compiler()))
    AttentionMaskInterface.register("sharded", sdpa_mask)
    model = _model()
    model.set_attn_implementation("sharded")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    for layer in model.model.layers:
        plan = {**{name: ColwiseParallel() for name in columns}, **{name: RowwiseParallel() for name in rows}}
        parallelize_module(layer, grid["tp"], plan)
        fully_shard(layer, mesh=grid["cp"])
    fully_shard(model, mesh=grid["cp"])
    return {"tensor parallel": (_step(model, axis="cp"), _grads(model))}


def _low_precision(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """Weights in float32, computed in bfloat16."""
    model = _model(torch.float32)
    model.compile(**_compiler("striped", "ring"))
    parallel = DistributedDataParallel(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _step(parallel, "striped")
    return {"bfloat16": (loss, _grads(parallel))}


def _encoder_model() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.4,
    )  # fmt: skip
    return BertForMaskedLM(config).double()


def _encoder(mesh: DeviceMesh, folder: str) -> dict[str, Any]:
    """Every token sees all: the padding of a length that the ranks don't divide is masked. Gradients are added by hand."""
    model = _encoder_model()
    model.compile(**_compiler("striped"))
    ids, labels = (x[:, :13] for x in _batch())
    shard = distributed.shard_inputs({"input_ids": ids, "labels": labels}, order="striped", shift_labels=False)
    labels = shard.pop("labels")
    loss = distributed.sharded_loss(model(**shard).logits, labels, gradients="sum")
    loss.backward()
    grads = _grads(model)
    for grad in grads.values():
        dist.all_reduce(grad, group=mesh.get_group("cp"))
    return {"encoder": (loss.detach(), grads)}


def _job(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", tuple(MESH.values()), mesh_dim_names=tuple(MESH))
    distributed.set_mesh(mesh)
    for case in (_ddp, _fsdp, _fsdp_by_layer, _low_precision, _encoder, _tensor_parallel):
        torch._dynamo.reset()
        found |= case(mesh, folder)
    return found


def _alone(model: LlamaForCausalLM, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The step of one process that has the whole batch."""
    ids, labels = _batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), _grads(model)


def _encoded() -> tuple[Tensor, dict[str, Tensor]]:
    model = _encoder_model()
    ids, labels = (x[:, :13] for x in _batch())
    loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach(), _grads(model)


def _resume_job(rank: int, folder: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Two ranks load what four saved, and take the next step."""
    model = _model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.compile(**_compiler("zigzag", "ring"))
    for p in model.parameters():
        p.data.zero_()
    optimizer = _optimizer(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loss = _step(model, "zigzag", axis="cp")
    optimizer.step()
    return loss, {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def _gaps(found: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]]) -> Iterator[float]:
    yield float((found[0] - right[0]).abs())
    assert found[1].keys() == right[1].keys()
    for name, tensor in right[1].items():
        yield float((found[1][name] - tensor).detach().abs().max())


@pytest.mark.long
def test_a_step_over_ranks_is_that_of_one(tmp_path: Path) -> None:
    """DDP, FSDP2, tensor parallelism, activation checkpoints, accumulation, bfloat16; saved by four ranks and loaded by two."""
    folder = str(tmp_path / "saved")
    model = _model()
    right = _alone(model)
    encoded = _encoded()
    ranks = over_ranks(MESH, _job, folder, timeout=200.0, patience=400.0)
    for found in ranks:
        assert found.keys() == {"ddp", "accumulated", "fsdp, checkpointed", "fsdp by layer", "tensor parallel", "bfloat16", "encoder"}
        for name in found.keys() - {"bfloat16", "encoder"}:
            assert max(_gaps(found[name], right)) <= 1e-12, name
        assert max(_gaps(found["encoder"], encoded)) <= 1e-12
    low = _alone(_model(torch.float32), autocast=True)
    for found in ranks:
        assert _distance(found["bfloat16"], right) <= 2 * _distance(low, right)
    optimizer = _optimizer(model)
    optimizer.step()
    optimizer.zero_grad()
    loss, _ = _alone(model)
    optimizer.step()
    resumed = over_ranks({"cp": 2}, _resume_job, folder, timeout=200.0, patience=400.0)
    for found in resumed:
        assert max(_gaps(found, (loss, dict(model.named_parameters())))) <= 1e-12


def _distance(found: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Of all gradients together."""
    return float(torch.stack([(found[1][name] - right[1][name]).norm() for name in right[1]]).norm())
