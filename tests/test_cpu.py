from llamapro_kernels import cpu


def test_the_best_build_is_the_one_whose_instructions_are_all_there(monkeypatch):
    """AMX is only there when Linux lends it too."""
    avx2 = {"avx2", "fma", "f16c", "bmi2", "movbe"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    amx = avx512 | {"avx512_bf16", "amx_tile", "amx_bf16"}
    monkeypatch.delenv("LLAMAPRO_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")

    def best(words, granted=True):
        monkeypatch.setattr(cpu, "words", lambda: words)
        monkeypatch.setattr(cpu, "_tiles_are_granted", lambda: granted)
        return cpu.runnable_builds()[0]

    assert best(set()) == "baseline"
    assert best(avx2) == "avx2"
    assert best(avx512) == best(amx - {"avx512_bf16"}) == "avx512"
    assert best(amx - {"amx_tile"}) == best(amx, granted=False) == "avx512_bf16"
    assert best(amx) == "amx"
    monkeypatch.setenv("LLAMAPRO_CPU_CAPABILITY", "avx2")
    assert cpu.runnable_builds() == ["avx2"]
