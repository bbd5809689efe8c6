from tests.vectors.cases import case, check, pytest_generate_tests  # noqa: F401
