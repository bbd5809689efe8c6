-- Beside the database `mlflow`, which PostgreSQL's image makes: logins and permissions.
CREATE DATABASE mlflow_auth OWNER mlflow;
