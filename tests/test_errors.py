"""errors.py: a message is one line, without secrets, and says whether the user or a disk is at fault."""

import errno

import pytest

from esm2_composer.errors import TransientError, UserError, system_error, tell


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EROFS, errno.EINVAL, None, errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_no_mistake_of_a_recipe(number):
    expected = TransientError if number in (errno.EIO, errno.ENOSPC) else UserError
    assert type(system_error("message", OSError(number, "reason"))) is expected


def test_a_message_is_one_line_of_text_whatever_is_quoted_in_it():
    assert str(UserError("a\n  b \x1b[31m\0 é \udcff")) == r"a b \x1b[31m\x00 é \udcff"


def test_a_long_value_that_is_quoted_is_shortened_and_what_stands_around_it_stays():
    told = str(UserError(f"recipe.yaml: 'seed' must be a whole number, not '{5000 * 'x'}'; write 17"))
    assert len(told) == 1000
    assert told.startswith("recipe.yaml: 'seed' must be a whole number, not 'xxx")
    assert " ... " in told
    assert told.endswith("xxx'; write 17")
    assert str(UserError(told)) == told


def test_no_password_of_an_address_is_told(capsys):
    tell(UserError('neither "http://user:sE@cR@127.0.0.1:80/bucket?x=a@b" nor oci://bucket@namespace/x'))
    assert capsys.readouterr().err == 'neither "http://127.0.0.1:80/bucket?x=a@b" nor oci://bucket@namespace/x\n'
