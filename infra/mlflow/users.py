"""Make the login that jobs use, who is no administrator: python users.py SERVER [experiment=NAME] [model=NAME] ...

Who makes an experiment or a model manages it, and everybody with a login reads; so the jobs need no more than a login.
Those that are named here, made by somebody else, the jobs may manage too. Run again, it sets the passwords of today.
MLFLOW_AUTH_ADMIN_PASSWORD and MLFLOW_JOBS_PASSWORD come from the environment.
"""

import os
import sys

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

JOBS = "jobs"


def main(server: str, *managed: str) -> None:
    os.environ["MLFLOW_TRACKING_USERNAME"] = "admin"
    os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    logins = get_app_client("basic-auth", tracking_uri=server)
    try:
        logins.create_user(JOBS, os.environ["MLFLOW_JOBS_PASSWORD"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        logins.update_user_password(JOBS, os.environ["MLFLOW_JOBS_PASSWORD"])
    for argument in managed:
        kind, _, name = argument.partition("=")
        if kind == "experiment":
            found = MlflowClient(server).get_experiment_by_name(name)
            if found is None:
                sys.exit(f"error: there is no experiment {name}")
            logins.grant_user_permission(JOBS, "experiment", found.experiment_id, "MANAGE")
        elif kind == "model":
            logins.grant_user_permission(JOBS, "registered_model", name, "MANAGE")
        else:
            sys.exit(f"error: {argument}: give experiment=NAME or model=NAME")
    print(f"{JOBS} may log in to {server}")


if __name__ == "__main__":
    main(*sys.argv[1:])
