from edgeprune.graph.forms import SizeForm
from edgeprune.lowering.fitted_forms import FittedForms

SIZES = {"heads": 6, "head_size": 32, "embedding": 192, "inner": 768}


def shapes(widths):
    heads, size, embedding, inner = (widths[name] for name in SIZES)
    return {
        "tokens": (64, embedding),
        "queries": (64, 3 * heads * size),
        "concat": (1, embedding + 2 * inner + 5, 7, 7),
        "flat": (embedding * 49,),
        "curved": (embedding * embedding, 3),
        "three": (heads * size * embedding,),
    }


def test_sums_and_products_are_recognized_and_anything_else_is_left_out():
    fitted = FittedForms(SIZES, shapes)
    assert fitted.of("tokens") == (SizeForm(64), SizeForm(0, ((("embedding",), 1),)))
    assert fitted.of("queries") == (SizeForm(64), SizeForm(0, ((("head_size", "heads"), 3),)))
    assert fitted.of("concat")[1] == SizeForm(5, ((("embedding",), 1), (("inner",), 2)))
    assert fitted.of("flat") == (SizeForm(0, ((("embedding",), 49),)),)
    assert fitted.of("curved") == (None, SizeForm(3))
    assert fitted.of("three") == (None,)
