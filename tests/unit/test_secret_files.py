"""Secrets given as files, as an orchestrator mounts them."""

from pathlib import Path

import pytest

from positions.settings import SettingsError, load, secret_files, unknown


def test_the_content_of_the_file_is_the_secret(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("s3cr:t/@\n")
    (tmp_path / "key").write_text("key\n")
    given = {
        "POSTGRES_PASSWORD_FILE": str(tmp_path / "password"),
        "POSITION_MANAGER_API_KEY_FILE": str(tmp_path / "key"),
    }
    settings = load(given)
    assert "postgres:s3cr%3At%2F%40@" in settings.database
    assert settings.api_key
    assert settings.api_key.get_secret_value() == "key"
    assert unknown(given) == {}


def test_only_secrets_may_be_files() -> None:
    assert {"POSTGRES_PASSWORD_FILE", "RABBITMQ_PASSWORD_FILE", "POSITION_MANAGER_BROKER_URL_FILE"} <= set(
        secret_files()
    )
    assert "POSTGRES_HOST_FILE" not in secret_files()
    assert "POSITION_MANAGER_PORT_FILE" in unknown({"POSITION_MANAGER_PORT_FILE": "x"})


@pytest.mark.parametrize("content", [None, "", "\n", "x" * 100_001])
def test_a_file_without_a_secret_is_an_error_that_names_the_variable(
    content: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"^REDIS_PASSWORD_FILE: ") as error:
        load({"REDIS_PASSWORD_FILE": str(file)})
    assert "xxx" not in str(error.value)


def test_a_secret_given_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("one")
    with pytest.raises(SettingsError, match="REDIS_PASSWORD is set too"):
        load({"REDIS_PASSWORD_FILE": str(tmp_path / "password"), "REDIS_PASSWORD": "two"})
