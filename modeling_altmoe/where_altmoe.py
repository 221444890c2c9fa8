"""Conditions on a store's columns: `{column: value | [values] | {"ge"|"gt"|"le"|"lt"|"ne": value}}`, all of them together.

Comes in: conditions as words (`year>=2020`) or as such a dictionary. Goes out: checked conditions with values of the
columns' own types, or which rows of an Arrow table meet them. Every backend of a search takes the checked form.
"""

import re
from typing import Any

import numpy as np

try:  # searching a store needs them, loading a checkpoint does not
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Value
except ImportError:
    pa = None

SIGNS = {">=": "ge", "<=": "le", "!=": "ne", ">": "gt", "<": "lt", "=": "eq"}
COMPARISONS = {"ge": "greater_equal", "gt": "greater", "le": "less_equal", "lt": "less", "ne": "not_equal"}


def _value(column: str, kind: str, value: Any) -> Any:
    """The value in the column's type: text is read as it (`"2020"` of an integer column is 2020)."""
    wanted = Value(kind).pa_type
    try:
        if not isinstance(value, str) and pa.types.is_string(wanted):
            raise pa.ArrowInvalid("not a text")
        if pa.types.is_integer(wanted) and not isinstance(value, str) and int(value) != value:
            raise pa.ArrowInvalid("Arrow would cut it off")
        return (pa.scalar(value).cast(wanted) if isinstance(value, str) else pa.scalar(value, wanted)).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError) as error:
        raise ValueError(f"Column '{column}' is of type {kind}, which {value!r} is not.") from error


def check_where(where: dict[str, Any] | None, columns: dict[str, str]) -> dict[str, Any] | None:
    """Conditions with the values in their columns' types; None for none.

    Args:
        where: see the top of this file.
        columns: the store's, `{name: Arrow type}`; `id` is always one.

    Raises:
        ValueError: an unknown column or comparison, no values, or a value that is not of the column's type.
    """
    if not where:
        return None
    if not isinstance(where, dict):
        raise ValueError(f"where is {{column: condition}}, got {type(where).__name__}.")
    columns = {"id": "string", **columns}
    checked: dict[str, Any] = {}
    for column, condition in where.items():
        if column not in columns:
            raise ValueError(f"There is no column '{column}' to filter by. Columns: {', '.join(columns)}.")
        kind = columns[column]
        if isinstance(condition, dict):
            unknown = sorted(set(condition) - set(COMPARISONS))
            if unknown or not condition:
                raise ValueError(
                    f"Column '{column}': {unknown or 'nothing'} compares nothing. Known: {sorted(COMPARISONS)}."
                )
            checked[column] = {name: _value(column, kind, value) for name, value in condition.items()}
        elif isinstance(condition, (list, tuple, set)):
            if not condition:
                raise ValueError(f"Column '{column}': an empty list, which nothing can be one of.")
            checked[column] = [_value(column, kind, value) for value in condition]
        else:
            checked[column] = _value(column, kind, condition)
    return checked


def parse_where(conditions: list[str], columns: dict[str, str]) -> dict[str, Any] | None:
    """Conditions as words -> as a checked dictionary.

    Args:
        conditions: `"column=value"`, `"column!=value"` and with `>= <= > <`. Several `=` on one column mean any of them.
        columns: the store's, `{name: Arrow type}`.

    Raises:
        ValueError: not of that form, conditions on one column that cannot be joined, and as `check_where`.
    """
    equal: dict[str, list[str]] = {}
    compared: dict[str, dict[str, str]] = {}
    for condition in conditions:
        match = re.match(r"\s*([^=<>!]+?)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*$", condition, re.DOTALL)
        if not match:
            raise ValueError(f"'{condition}' is no condition: expected column=value, or one of {' '.join(SIGNS)}.")
        column, name, value = match[1], SIGNS[match[2]], match[3]
        if name == "eq":
            equal.setdefault(column, []).append(value)
        elif name in compared.setdefault(column, {}):
            raise ValueError(f"'{condition}': column '{column}' has two conditions with {match[2]}.")
        else:
            compared[column][name] = value
    both = sorted(set(equal) & set(compared))
    if both:
        raise ValueError(f"Column '{both[0]}' has conditions with = and with another sign: give only one kind.")
    single = {column: values[0] if len(values) == 1 else values for column, values in equal.items()}
    return check_where({**single, **compared}, columns)


def rows_where(store, where: dict[str, Any]) -> np.ndarray:
    """Rows of a store that meet all (checked) conditions, `(found,)` int64 in order. A missing value meets none.

    Args:
        store: a LatentStore; its columns are read where they lie, memory-mapped.
    """
    keep = np.ones(len(store), dtype=bool)
    for column, condition in where.items():
        values = store.arrow(column)
        if isinstance(condition, dict):
            found = [getattr(pc, COMPARISONS[name])(values, pa.scalar(v, values.type)) for name, v in condition.items()]
        elif isinstance(condition, list):
            found = [pc.is_in(values, pa.array(condition, values.type))]
        else:
            found = [pc.equal(values, pa.scalar(condition, values.type))]
        for meets in found:
            keep &= pc.fill_null(meets, False).to_numpy()
    return np.flatnonzero(keep)
