"""Tests of the Python API: what it accepts, and how it rejects the rest."""
import array
import ctypes

import pytest

import train_gpt2
from conftest import LIB, random_model, rejects, V


class Tokens:
    """An array of another library: it has tolist() only."""
    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


@pytest.mark.parametrize("x", [
    [[1, 2, 3]], ((1, 2, 3),), [range(1, 4)], [b"\1\2\3"], [array.array("q", [1, 2, 3])], Tokens([[1, 2, 3]]),
    memoryview(array.array("q", [1, 2, 3])).cast("B").cast("q", (1, 3)), (ctypes.c_int64 * 3 * 1)((1, 2, 3))])
def test_tokens_of_any_integer_type_are_accepted(x):
    model = random_model(8, 5, 1, 1, 4)
    assert model.logits(x).tolist() == model.logits([[1, 2, 3]]).tolist()


@pytest.mark.parametrize("tokens", [
    None, 1, "abc", b"abc", [1, 2, 3], ["abc"], [[1.0, 2.0]], [[1, None]], [["1"]], {"x": 1}, Tokens([1.5]),
    [[[1]]], array.array("d", [1])])
def test_what_is_not_token_ids_is_rejected(tokens):
    model = random_model(8, 5, 1, 1, 4)
    for call in (model.logits, lambda x: model.forward(x, [[1]]), lambda y: model.forward([[1]], y)):
        with rejects("the tokens are", "(B,T)"):
            call(tokens)


@pytest.mark.parametrize("tokens", [None, 1, "ab", [1.0], [[1]], [None]])
def test_a_prompt_that_is_not_token_ids_is_rejected(tokens):
    with rejects("the tokens are", "expected"):
        next(random_model(8, 5, 1, 1, 4).generate(tokens, 1))


@pytest.mark.parametrize("token", [2**31, 2**32 + 1, 2**64 + 1, -2**31 - 1])
def test_token_ids_beyond_32_bits_are_rejected(token):
    model = random_model(8, 5, 1, 1, 4)
    for call in (lambda: model.logits([[0, token]]), lambda: model.forward([[0, 1]], [[0, token]]),
                 lambda: next(model.generate([0, token], 1))):
        with rejects(token, "32 bits"):
            call()


INTEGERS = [f"c_{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("order", ["__ctype_le__", "__ctype_be__"])
@pytest.mark.parametrize("name", ["c_float", "c_double", "c_long", "c_ulong", *INTEGERS])
def test_set_converts_any_type_and_byte_order_to_float32(name, order):
    model = random_model(8, 5, 1, 1, 4)
    numbers = [1, 20, 3, 200 if name.startswith("c_u") else -100]
    model.set("lnfb", (getattr(getattr(ctypes, name), order) * 4)(*numbers))
    assert model.get("lnfb").tolist() == numbers


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f8", ">i8", "?", "u1"])
def test_set_converts_arrays_of_numpy(dtype):
    numpy = pytest.importorskip("numpy")
    model = random_model(8, 5, 1, 1, 4)
    values = numpy.array([[1, 0, 3], [7, 100, 5]]).astype(dtype)[:, :2]     # not contiguous
    model.set("lnfb", values)
    assert model.get("lnfb").tolist() == values.astype("f4").ravel().tolist()
    model.set("lnfb", -values.astype("f4").T)
    assert model.get("lnfb").tolist() == (-values.astype("f4").T).ravel().tolist()


def test_set_takes_lists_and_other_arrays_and_rejects_the_rest():
    model = random_model(8, 5, 1, 1, 4)
    for values in ([1, 2, 3, 4], (1.0, 2, 3, 4), array.array("H", [1, 2, 3, 4]), Tokens([[1, 2], [3, 4.0]])):
        model.set("lnfb", values)
        assert model.get("lnfb").tolist() == [1, 2, 3, 4]
    nan = array.array("I", [0x7FC12345] * 4)
    model.set("lnfb", memoryview(nan).cast("B").cast("f"))
    assert model.get("lnfb").tobytes() == nan.tobytes()
    for values in (None, 1, "abcd", b"\0" * 16, bytearray(16), [None] * 4, [[1, 2], [3, 4]], Tokens("abcd"),
                   (ctypes.c_char * 16)(), [1j] * 4):
        with rejects("expected an array of real numbers"):
            model.set("lnfb", values)
    with rejects("(4,)", "5 numbers"):
        model.set("lnfb", [0] * 5)


def test_closed_objects_report_that_they_are_closed(data):
    model, loader = random_model(8, 5, 1, 1, 4), train_gpt2.Loader(data / "data" / "val_*.bin", 1, 8, V)
    assert repr(model) == f"GPT2(L 1, C 4, NH 1, V 5, max_T 8: 304 parameters; {LIB.gpt2_device().decode()})"
    kept = random_model(8, V, 1, 1, 4)
    for handle in (model, loader):
        handle.close()
        handle.close()
    for call in (lambda: model.forward([[1]], [[1]]), model.backward, lambda: model.get("wte"),
                 model.grad_norm, lambda: next(model.generate([1], 1)), lambda: model.updates,
                 lambda: model.save("x")):
        with rejects("this GPT2 is closed"):
            call()
    for call in (loader.next, loader.reset, lambda: kept.evaluate(loader, 1)):
        with rejects("this Loader is closed"):
            call()
    assert repr(model).endswith("closed)") and not hasattr(model, "anything")
