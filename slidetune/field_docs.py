"""The text under each field of a dataclass: the one place that says what it means."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring under it, on one line. Read from the class's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    docs = {}
    for field, text in pairwise(tree.body[0].body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs
