"""ESM2 is ESM-2: logits and gradients equal those of transformers and fair-esm; sizes, init, FLOPs."""

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from benchmarks.parity import LENGTHS, compare, fair_esm, hugging_face, random_batch, random_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from esm2_composer import alphabet
from esm2_composer.attention import Attention, _torch_varlen_operator
from esm2_composer.model import (
    ESM2,
    SIZES,
    ESM2Config,
    Layer,
    count_parameters,
    layer_name,
    rotary_frequencies,
    rotary_tables,
    rotate,
)
from esm2_composer.optim import build_adamw

# the head sizes of all six models
CONFIGS = {
    16: ESM2Config(2, 64, 4, 256),
    24: ESM2Config(2, 96, 4, 384),
    32: ESM2Config(2, 128, 4, 512),
    64: ESM2Config(2, 128, 2, 512),
    128: ESM2Config(2, 256, 2, 1024),
}


@pytest.mark.parametrize("make_reference", [hugging_face, fair_esm])
@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(config, id=str(head_size)) for head_size, config in CONFIGS.items()),
        pytest.param(SIZES["8m"], id="8m", marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_equal_the_reference(config, make_reference):
    found = compare(random_model(config), make_reference)
    assert found["logits_std"] > 0.5
    assert found["logit_error"] <= 1e-4
    assert found["gradient_error"] <= 1e-4, found["worst_gradient"]


def test_representations_are_those_of_transformers_at_every_layer():
    model = random_model(replace(CONFIGS[16], num_layers=4)).eval()  # of two groups
    tokens, cu_seqlens = random_batch(LENGTHS)
    batch = pad_sequence(tokens.split(LENGTHS), batch_first=True, padding_value=alphabet.PAD)
    with torch.no_grad():
        reference = hugging_face(model).eval().esm
        hidden = reference(batch, (batch != alphabet.PAD).long(), output_hidden_states=True).hidden_states
        for layer, expected in enumerate(hidden):
            expected = torch.cat([row[:length] for row, length in zip(expected, LENGTHS, strict=True)])
            assert (model.represent(tokens, cu_seqlens, layer=layer) - expected).abs().max() <= 1e-4
        last = model.represent(tokens, cu_seqlens)
        assert torch.equal(last, model.represent(tokens, cu_seqlens, layer=len(hidden) - 1))
    with pytest.raises(ValueError, match="layer 5 is not one of 0 to 4"):
        model.represent(tokens, cu_seqlens, layer=5)


@pytest.mark.parametrize(("size", "units"), [("8m", 2), ("650m", 11), ("3b", 12), ("15b", 48)])
def test_layers_are_sharded_three_at_a_time_unless_they_are_large(size, units):
    with torch.device("meta"):
        model = ESM2(SIZES[size])
    assert sum(model.fsdp_wrap_fn(module) for module in model.modules()) == units
    names = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    assert names == [layer_name(i) for i in range(SIZES[size].num_layers)]


def test_a_sequence_does_not_see_its_neighbours():
    model = random_model(CONFIGS[16]).eval()
    tokens, cu_seqlens = random_batch(LENGTHS)
    with torch.no_grad():
        together = model(tokens, cu_seqlens).split(LENGTHS)
        for sequence, logits in zip(tokens.split(LENGTHS), together, strict=True):
            alone = model(sequence, torch.tensor([0, len(sequence)], dtype=torch.int32))
            assert (alone - logits).abs().max() <= 1e-5  # products of another height round differently

        others = tokens.clone()
        others[: -LENGTHS[-1]] = random_batch(LENGTHS, seed=2)[0][: -LENGTHS[-1]]
        changed = model(others, cu_seqlens).split(LENGTHS)
        assert torch.equal(changed[-1], together[-1])
        assert not torch.equal(changed[-2], together[-2])

        exact = model.double()  # leaves no room for anything but the neighbours
        for sequence, logits in zip(tokens.split(LENGTHS), exact(tokens, cu_seqlens).split(LENGTHS), strict=True):
            alone = exact(sequence, torch.tensor([0, len(sequence)], dtype=torch.int32))
            assert (alone - logits).abs().max() <= 1e-6


def test_positions_select_rows_of_the_full_logits():
    model = random_model(CONFIGS[16]).eval()
    tokens, cu_seqlens = random_batch([20, 30])
    positions = torch.tensor([0, 7, 49])
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, cu_seqlens, positions=positions), model(tokens, cu_seqlens)[positions]
        )


def test_to_compute_positions_alone_has_the_gradients_of_computing_all():
    tokens, cu_seqlens = random_batch([20, 30])
    positions = torch.tensor([0, 7, 8, 49])

    def gradients(predict) -> list[torch.Tensor]:
        model = random_model(replace(CONFIGS[16], num_layers=4)).double()
        F.cross_entropy(predict(model), tokens[positions].clamp(max=31)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    alone = gradients(lambda model: model(tokens, cu_seqlens, positions=positions))
    of_all = gradients(lambda model: model(tokens, cu_seqlens)[positions])
    assert len(alone) == len(of_all) > 20
    for one, other in zip(alone, of_all, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_nothing_to_predict_gives_no_logits_and_gradients_of_zero():
    model = random_model(CONFIGS[16])
    tokens, cu_seqlens = random_batch([20, 30])
    logits = model(tokens, cu_seqlens, positions=torch.empty(0, dtype=torch.int64))
    assert logits.shape == (0, 33)
    logits.sum().backward()
    assert all(not p.grad.any() for p in model.groups.parameters())


def test_tokens_may_be_uint8():
    model = random_model(CONFIGS[16]).eval()
    tokens, cu_seqlens = random_batch([20, 30])
    with torch.no_grad():
        assert torch.equal(model(tokens.to(torch.uint8), cu_seqlens), model(tokens, cu_seqlens))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("8m", 7_512_474),
        ("35m", 33_501_394),
        ("150m", 148_140_154),
        ("650m", 651_043_254),
        ("3b", 2_839_005_634),
        ("15b", 15_129_100_194),
    ],
)
def test_sizes_have_the_published_parameter_counts(size, parameters):
    with torch.device("meta"):
        assert count_parameters(ESM2(SIZES[size])) == parameters


@pytest.mark.parametrize(
    ("dimensions", "complaint"),
    [
        *[
            ((2, 64, 3, 256), "does not divide"),
            ((2, 60, 5, 256), "multiple of 8"),
            ((0, 64, 4, 256), "num_layers"),
        ],
        *[((10**9, 64, 4, 256), "num_layers must be at most 1000"), ((2, 2**17, 4, 256), "at most 65536")],
        ((2, 64, 4, 2**21), "ffn_hidden_size must be at most 1048576"),
    ],
)
def test_impossible_dimensions_are_refused(dimensions, complaint):
    with pytest.raises(ValueError, match=complaint):
        ESM2Config(*dimensions)


def test_initialisation_is_normal_with_zero_biases_and_pad_row():
    torch.manual_seed(0)
    model = ESM2(CONFIGS[128])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 10_000:
            assert abs(parameter.std() - 0.02) < 4e-4, name
            assert abs(parameter.mean()) < 4e-4, name
    assert not model.embed.weight[alphabet.PAD].any()
    assert model.embed.weight[alphabet.PAD + 1].any()


def test_rotary_tables_are_exact_to_fp32():
    positions = torch.tensor([0, 1, 1025])
    cos, sin = rotary_tables(positions, rotary_frequencies(64))
    exact = positions.double()[:, None] * 10000 ** (-torch.arange(0, 64, 2).double() / 64)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[:, 0].double(), exact.cos(), atol=2e-4, rtol=0)
    torch.testing.assert_close(sin[:, 0].double(), exact.sin(), atol=2e-4, rtol=0)


def test_no_cast_of_the_model_rounds_the_rotary_frequencies():
    model = random_model(CONFIGS[64]).bfloat16()
    assert model.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.rotary_bits.view(torch.float32), rotary_frequencies(64))
    assert not any(buffer.is_floating_point() for buffer in model.buffers())  # FSDP casts those


def test_fsdp_in_bf16_does_not_round_the_rotary_tables(monkeypatch, one_rank):
    model = random_model(CONFIGS[64])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model.groups, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    seen = set()

    def spy(x, cos, sin):
        seen.add((x.dtype, cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    monkeypatch.setattr("esm2_composer.model.rotate", spy)
    with torch.no_grad():
        model(*random_batch([20, 30]))
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}


def test_a_sequence_that_is_masked_whole_gives_finite_logits():
    tokens = torch.full((8,), alphabet.MASK)
    with torch.no_grad():
        assert random_model(CONFIGS[16])(tokens, torch.tensor([0, 8]).int()).isfinite().all()


def test_a_model_in_bf16_stays_near_the_fp32_one():
    model = random_model(CONFIGS[64]).eval()
    tokens, cu_seqlens = random_batch(LENGTHS)
    with torch.no_grad():
        exact = model(tokens, cu_seqlens)
        rounded = model.bfloat16()(tokens, cu_seqlens).float()
    assert (rounded - exact).norm() <= 0.03 * exact.norm()  # bf16 frequencies would give about 0.3


@pytest.mark.parametrize(
    ("tokens", "cu_seqlens", "complaint"),
    [
        (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 5]).int(), "tokens must be"),
        (torch.zeros(5), torch.tensor([0, 5]).int(), "must be integers"),
        (torch.zeros(5, dtype=torch.int64), torch.tensor([0, 5]), "cu_seqlens int32"),
        (torch.zeros(5, dtype=torch.int64), torch.tensor([5]).int(), r"cu_seqlens \(B\+1,\)"),
        (torch.zeros(5, dtype=torch.int64), torch.tensor([0, 4]).int(), "from 0 to the 5 tokens"),
        (torch.zeros(5, dtype=torch.int64), torch.tensor([1, 5]).int(), "from 0 to the 5 tokens"),
        (torch.zeros(5, dtype=torch.int64), torch.tensor([0, 3, 3, 5]).int(), "from 0 to the 5 tokens"),
        (torch.full((5,), 33), torch.tensor([0, 5]).int(), r"0\.\.32, not 33\.\.33"),
        (torch.full((5,), -1), torch.tensor([0, 5]).int(), r"0\.\.32, not -1"),
    ],
)
def test_what_is_no_flat_batch_is_refused(tokens, cu_seqlens, complaint):
    with pytest.raises(ValueError, match=complaint):
        ESM2(CONFIGS[16])(tokens, cu_seqlens)


def test_a_meta_device_model_initialises_as_a_real_one():
    torch.manual_seed(0)
    real = ESM2(CONFIGS[128])
    with torch.device("meta"):
        late = ESM2(CONFIGS[128])
    late.to_empty(device="cpu")
    for module in late.modules():  # as FSDP does it
        late.param_init_fn(module)
    for (name, a), b in zip(real.state_dict().items(), late.state_dict().values(), strict=True):
        if a.numel() > 10_000:
            torch.testing.assert_close(b.mean(), a.mean(), atol=4e-4, rtol=0, msg=name)
            torch.testing.assert_close(b.std(), a.std(), atol=4e-4, rtol=0, msg=name)
        elif not name.startswith("contact_head"):  # a few random numbers
            assert torch.equal(a, b) or name == "embed.weight", name


def check_compiled_layers(bf16=False, recomputes=False, **options):
    """Batches of several sizes: equal to eager, and four graphs for all layers and sizes: one a part, and one for
    what the first layer does otherwise."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, compiled = random_model(CONFIGS[16]), random_model(CONFIGS[16])
    compiled.compile_layers(**options)
    if recomputes:
        compiled.recompute(recomputes)
    for lengths in ([20, 30], [7], LENGTHS, [100, 3, 5]):
        tokens, cu_seqlens = random_batch(lengths)
        for each in (model, compiled):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = each(tokens, cu_seqlens)
            F.cross_entropy(logits.float(), tokens.clamp(max=31)).backward()
        for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
            if p.grad is not None:
                assert (p.grad - q.grad).norm() <= (3e-2 if bf16 else 1e-4) * p.grad.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("bf16", "recomputes"), [(False, False), (True, False), (False, "selective")])
def test_layers_compile_once_for_all_batches_without_a_graph_break(bf16, recomputes):
    check_compiled_layers(bf16, recomputes, backend="aot_eager")


def test_compiled_layers_run_in_all_modes_one_after_the_other():
    """More graphs of a part than torch's limit, beyond which it refuses."""
    torch._dynamo.reset()
    compiled = random_model(CONFIGS[16])
    compiled.compile_layers(backend="aot_eager")
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        for tokens in (9, 1):  # one is a graph of its own
            with mode():
                logits = compiled(torch.full((tokens,), 5), torch.tensor([0, tokens]).int())
            assert logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, "selective", True])
def test_layers_compiled_to_machine_code_train_as_eager_ones(recomputes):
    check_compiled_layers(recomputes=recomputes)


def test_what_is_recomputed_has_the_same_gradients_and_norms_and_gelu_no_products():
    tokens, cu_seqlens = random_batch(LENGTHS)

    def step(recomputes):
        model = random_model(CONFIGS[16])
        if recomputes:
            model.recompute(recomputes)
        with FlopCounterMode(display=False) as counter:
            logits = model(tokens, cu_seqlens, max(LENGTHS), torch.arange(0, 40, 3))
            F.cross_entropy(logits, tokens[:40:3]).backward()
        return [p.grad for p in model.parameters() if p.grad is not None], counter.get_total_flops()

    (once, operations), (selective, as_many), (whole, more) = map(step, (False, "selective", True))
    assert all(map(torch.equal, selective, once))
    assert all(map(torch.equal, whole, once))
    assert as_many == operations < more


RECOMPUTED = (True, "selective"), (False, True), (False, "selective")


def bytes_left(step):
    """Of tensors that are still there after a second step, before Python collects garbage."""
    step()
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects()}
        step()
        left = [each for each in gc.get_objects() if id(each) not in before and isinstance(each, torch.Tensor)]
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in left}.values())
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("compiled", "recomputes"),
    [(True, True), *(pytest.param(*each, marks=pytest.mark.slow) for each in RECOMPUTED)],
)
def test_what_was_recomputed_is_freed_without_collecting_garbage(compiled, recomputes):
    torch._dynamo.reset()
    model = random_model(CONFIGS[16])
    model.recompute(recomputes)
    if compiled:
        model.compile_layers(backend="aot_eager")
    tokens, cu_seqlens = random_batch(LENGTHS)

    def step():
        model(tokens, cu_seqlens, max(LENGTHS)).sum().backward()
        model.zero_grad(set_to_none=True)

    assert bytes_left(step) < 4 * sum(LENGTHS) * model.config.hidden_size  # one matrix


def a_training_step(model, device, bf16=False):
    """Logits and loss of a forward pass, as the task makes it; the gradients are clipped, and the model's."""
    tokens, cu_seqlens = (x.to(device) for x in random_batch(LENGTHS))
    positions = torch.arange(0, len(tokens), 3, device=device)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        logits = model(tokens.to(torch.uint8), cu_seqlens, max(LENGTHS), positions).float()
    loss = F.cross_entropy(logits, tokens[positions].clamp(max=31), reduction="sum") / len(positions)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return logits.detach(), loss.detach()


def test_no_part_of_a_step_needs_a_value_on_the_host(monkeypatch):
    """On torch's meta device, tensors have no values to read: what would make a GPU wait is an error."""
    monkeypatch.setattr(
        "esm2_composer.model.select_attention", lambda *_: Attention("torch", _torch_varlen_operator)
    )
    with torch.device("meta"):
        model = ESM2(CONFIGS[16])
    logits, _ = a_training_step(model.bfloat16(), "meta")
    assert logits.shape == (len(range(0, sum(LENGTHS), 3)), 33)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="meta"):
        model(*(x.to("meta") for x in random_batch([20, 30])))  # reads the longest from cu_seqlens


@pytest.mark.gpu
def test_no_part_of_a_step_makes_a_gpu_wait():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = random_model(CONFIGS[64]).cuda()
    optimizer = build_adamw(model, 1e-3, (0.9, 0.98), 1e-8, 0.01)
    for mode in ("default", "error"):  # the first step sets up what waits once
        tokens, cu_seqlens = (x.cuda() for x in random_batch(LENGTHS))
        positions = torch.arange(0, len(tokens), 3, device="cuda")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(tokens, cu_seqlens, max(LENGTHS), positions)
            F.cross_entropy(logits.float(), tokens[positions].clamp(max=31)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 128])
def test_on_a_gpu_logits_and_gradients_are_those_of_the_cpu(head_size, bf16):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    ours, theirs = random_model(CONFIGS[head_size]), random_model(CONFIGS[head_size]).cuda()
    (exact, _), (logits, _) = a_training_step(ours, "cpu"), a_training_step(theirs, "cuda", bf16)
    assert (logits.cpu() - exact).norm() <= (3e-2 if bf16 else 1e-4) * exact.norm()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.grad is not None:
            assert (q.grad.cpu() - p.grad).norm() <= (0.1 if bf16 else 1e-3) * p.grad.norm(), name


def test_flops_follow_the_formula():
    c = SIZES["650m"]
    with torch.device("meta"):
        model = ESM2(c)
    lengths, predicted = [1024, 100], 150
    d, tokens = c.hidden_size, 1124
    products = 72 * (c.num_layers - 1) * d**2 * tokens + 18 * d**2 * tokens + 54 * d**2 * predicted
    attention = 12 * c.num_layers * d * (1024**2 + 100**2)
    assert model.flops(lengths, predicted) == products + attention + 6 * (d**2 + 33 * d) * predicted
    assert model.flops([1024], 1024) / 1024 == pytest.approx(4.42e9, rel=1e-3)  # 650M, full length, all predicted
