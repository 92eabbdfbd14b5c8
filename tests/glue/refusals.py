"""How a task that cannot be read is refused."""

import pytest

from lola_glue.tasks import TaskError, load_task


def refused(*arguments, match: str, **options) -> str:
    """The message of the error that `load_task` must raise."""
    with pytest.raises(TaskError, match=match) as caught:
        load_task(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
