"""Document attention on CUDA against the same on the CPU in fp32."""

from __future__ import annotations

import pytest
import torch

from postlude.model.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (7, 1, 24, 300)
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {"llama": {}, "qwen3": {}, "gpt_oss": SLIDING, "olmo3": SLIDING, "gemma2": {}}


@pytest.mark.capability("Document attention on CUDA (varlen_attn)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_those_of_the_cpu(tiny, pack, architecture, dtype):
    results = []
    for device in ("cpu", "cuda"):
        model = tiny(architecture, **ARCHITECTURES[architecture]).to(device)
        with torch.autocast(device, dtype, enabled=device == "cuda" and dtype != torch.float32):
            hidden = model.hidden(pack(LENGTHS).to(device))
        (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1], device=device)).sum().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach().float().cpu(), gradients))
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    (expected, expected_gradients), (got, gradients) = results
    assert float((got - expected).abs().max()) < tolerance * float(expected.abs().max())
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).abs().max()) < tolerance * largest, name


@pytest.mark.capability("Document attention on CUDA (varlen_attn)")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logits_are_those_of_each_document_alone(tiny, architecture):
    assert verify(tiny(architecture, **ARCHITECTURES[architecture]).to("cuda")).exit_code == 0
