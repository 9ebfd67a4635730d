"""The stand-in computes what PyTorch does, and refuses what a Hopper GPU or the stand-in itself would not do.

Each test is one rank: only the fork server of this folder has Transformer Engine.
"""

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional


def alone(check):
    """A test that runs `check` on one rank; the check stays importable there under its own name."""

    def test():
        ranks.run_ranks(check, 1)

    return test


def close(value, expected, tolerance=2e-6):
    assert value.shape == expected.shape
    assert (value - expected).norm() <= tolerance * expected.norm()


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def norms() -> None:
    """Through Transformer Engine's modules, forward and backward."""
    import transformer_engine.pytorch as te

    x, weight, bias, grad = random(5, 3, 32), random(32) + 1, random(32), random(5, 3, 32)
    for module, reference in (
        (te.RMSNorm(32, eps=1e-3, device="cpu"), lambda x, w, b: functional.rms_norm(x, (32,), w, 1e-3)),
        (te.LayerNorm(32, eps=1e-3, device="cpu"), lambda x, w, b: functional.layer_norm(x, (32,), w, b, 1e-3)),
    ):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        expected = reference(*inputs)
        expected.backward(grad)
        with torch.no_grad():
            for name, value in (("weight", weight), ("bias", bias)):
                if hasattr(module, name):
                    getattr(module, name).copy_(value)
        own = x.clone().requires_grad_()
        out = module(own)
        out.backward(grad)
        close(out.detach(), expected.detach())
        close(own.grad, inputs[0].grad)
        close(module.weight.grad, inputs[1].grad)
        if hasattr(module, "bias"):
            close(module.bias.grad, inputs[2].grad)


def attention() -> None:
    """Grouped queries, causal and not, both orders of dimensions; with the logarithms that ring attention corrects."""
    from te_stand_in.extension import NVTE_Mask_Type, NVTE_QKV_Layout, attention

    q, k, v, grad = random(2, 4, 24, 8), random(2, 2, 24, 8), random(2, 2, 24, 8), random(2, 4, 24, 8)
    for layout, order in (("NVTE_SBHD_SBHD_SBHD", (2, 0, 1, 3)), ("NVTE_BSHD_BSHD_BSHD", (0, 2, 1, 3))):
        for mask in (NVTE_Mask_Type.NVTE_NO_MASK, NVTE_Mask_Type.NVTE_CAUSAL_MASK):
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            causal = mask == NVTE_Mask_Type.NVTE_CAUSAL_MASK
            expected = functional.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3, enable_gqa=True)
            expected.backward(grad)
            given = [t.permute(order).contiguous() for t in (q, k, v)]
            common = {"attn_scale": 0.3, "qkv_layout": NVTE_QKV_Layout[layout], "mask_type": mask}
            out, lse, _ = attention.fused_attn_fwd(**arguments(attention.fused_attn_fwd, given, **common))
            close(out, expected.detach().permute(order))
            grads = attention.fused_attn_bwd(
                **arguments(
                    attention.fused_attn_bwd,
                    given,
                    o=out,
                    d_o=grad.permute(order).contiguous(),
                    aux_ctx_tensors=[lse],
                    fake_dtype=torch.float32,
                    **common,
                )
            )
            for value, tensor in zip(grads[:3], inputs, strict=True):
                close(value, tensor.grad.permute(order))


def arguments(function, qkv, **known):
    """Every argument of a kernel: those that the stand-in reads, None for the rest."""
    import inspect

    names = inspect.signature(function).parameters
    return dict.fromkeys(names) | dict(zip("qkv", qkv, strict=True)) | known


def rotary_embedding() -> None:
    from te_stand_in.extension import NVTE_QKV_Format, fused_rope_backward, fused_rope_forward

    x, grad = random(6, 2, 3, 16).requires_grad_(), random(6, 2, 3, 16)
    freqs = torch.outer(torch.arange(9.0), 10.0 ** -torch.arange(6.0)).repeat(1, 2).view(9, 1, 1, 12)  # 12 of 16
    z = torch.complex(x[..., :6], x[..., 6:12]) * torch.polar(torch.ones(6, 1, 1, 6), freqs[:6, ..., :6])
    expected = torch.cat((z.real, z.imag, x[..., 12:]), dim=-1)
    expected.backward(grad)
    rest = (None, NVTE_QKV_Format.NVTE_SBHD, False, None, 1, 0)
    close(fused_rope_forward(x, freqs, *rest), expected.detach())
    close(fused_rope_backward(grad, freqs, *rest), x.grad)


def fused_adam() -> None:
    """Transformer Engine's FusedAdam, as Megatron's optimizer makes it, is AdamW."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    start = random(7, 5)
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    fused, reference = FusedAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(4):
        ours.grad = random(7, 5) * (step + 1)
        theirs.grad = ours.grad.clone()
        fused.step()
        reference.step()
    close(ours.detach(), theirs.detach(), 1e-6)


def quantizers():
    """By name: Transformer Engine's quantizers as the recipes make them, with both copies."""
    from te_stand_in.extension import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    both = {"rowwise": True, "columnwise": True}
    return {
        "whole": Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device=torch.device("cpu"), **both),
        "1D": Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=1, **both),
        "2D": Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=2, **both),
    }


def quantization() -> None:
    """Scales fill FP8's range, e4m3 keeps three bits of mantissa, and saturation never makes a NaN."""
    # Magnitudes that differ from block to block, and a last block that is not full.
    x = random(160, 144) * torch.logspace(-2, 2, 160)[:, None]
    for name, quantizer in quantizers().items():
        tensor = quantizer(x)
        back = tensor.dequantize(dtype=torch.float32)
        scales = tensor._scale_inv if name == "whole" else tensor._rowwise_scale_inv
        used = scales[scales > 0]
        # Half a step of the mantissa; below the smallest normal number (2^-6 of a range to 448) an absolute error.
        floor = x.abs().max() if name == "whole" else x.abs().amax(1, keepdim=True) if name == "1D" else 100
        assert ((back - x).abs() <= 2**-4 * x.abs() + 2**-10 / 224 * floor).all(), name
        if name == "whole":
            assert tensor._data.view(torch.float8_e4m3fn).float().abs().max() == 448
            assert used.item() == pytest.approx(x.abs().max().item() / 448)
        else:
            assert torch.equal(used.log2().round(), used.log2()), "a block's scale is a power of two"
            assert len(used) == {"1D": 160 * 2, "2D": 2 * 2}[name]
    spiky = torch.zeros(16, 16)
    spiky[3, 4] = 3e38
    assert torch.isfinite(quantizers()["2D"](spiky).dequantize(dtype=torch.float32)).all()


def products() -> None:
    """Every layout of a product, of FP8 operands and plain ones, is that of the dequantized values."""
    from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm

    tokens, width, out = 48, 32, 64
    x, weight, grad = random(tokens, width), random(out, width), random(tokens, out)
    for input_name, weight_name in (("", ""), ("whole", "whole"), ("1D", "2D")):
        q, w = quantizers().get(input_name), quantizers().get(weight_name)
        xq, wq, gq = (x, weight, grad) if not q else (q(x), w(weight), q.copy()(grad))
        x_, w_, g_ = ((t.dequantize(dtype=torch.float32) if q else t).double() for t in (xq, wq, gq))
        kind = {"out_dtype": torch.float32}
        close(general_gemm(wq, xq, layout="TN", **kind)[0].double(), x_ @ w_.T)
        close(general_gemm(wq, gq, layout="NN", grad=True, **kind)[0].double(), g_ @ w_)
        into = torch.ones(out, width)
        general_gemm(xq, gq, layout="NT", grad=True, accumulate=True, out=into, **kind)
        # Along the tokens, blocks have scales of their own.
        exact = 1e-6 if input_name != "1D" else 0.05
        close(into.double(), 1 + g_.T @ x_, exact)
        biased = general_gemm(wq, xq, layout="TN", out_dtype=torch.bfloat16, bias=torch.ones(out))[0]
        close(biased.double(), x_ @ w_.T + 1, 4e-3)


def refusals() -> None:
    """Hopper's rules, and calls that the stand-in does not compute."""
    from te_stand_in import KernelError, NotModelled
    from te_stand_in.extension import DType, fused_rope_forward, gelu
    from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    def multiply(rows=16, width=32, outputs=32, kinds=("whole", "whole"), layout="TN"):
        x, w = quantizers()[kinds[0]](random(rows, width)), quantizers()[kinds[1]](random(outputs, width))
        return general_gemm(w, x, layout=layout, out_dtype=torch.bfloat16)

    multiply()
    multiply(rows=3)  # no rule on the rows of a tensor with one scale
    for broken, rule in (
        ({"width": 24}, "leading dimension 24"),
        ({"outputs": 20}, "outer dimension 20 of A"),
        ({"kinds": ("1D", "2D"), "rows": 12}, "outer dimension 12 of B"),
        ({"kinds": ("2D", "2D")}, "2D by 2D"),
    ):
        with pytest.raises(KernelError, match=rule):
            multiply(**broken)
    quantizer = quantizers()["whole"]
    quantizer.set_usage(columnwise=False)
    one_way = quantizer(random(32, 32))
    with pytest.raises(KernelError, match="Input A is missing column-wise usage"):
        general_gemm(one_way, quantizers()["whole"](random(16, 32)), layout="NN", out_dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="one operand is FP8 and the other is not"):
        general_gemm(one_way, random(16, 32), layout="TN", out_dtype=torch.bfloat16)
    delayed = Float8Quantizer(torch.ones(1), torch.ones(1), DType.kFloat8E4M3)
    for call in (lambda: delayed(random(16, 16)), lambda: gelu(None), lambda: fused_rope_forward(*[None] * 8)):
        with pytest.raises(NotModelled):
            call()


test_norms = alone(norms)
test_attention = alone(attention)
test_rotary_embedding = alone(rotary_embedding)
test_fused_adam = alone(fused_adam)
test_quantization = alone(quantization)
test_products = alone(products)
test_refusals = alone(refusals)
