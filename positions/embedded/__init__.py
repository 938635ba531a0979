"""The whole service on one bare machine: `positions up`, with PostgreSQL and Valkey from wheels."""
