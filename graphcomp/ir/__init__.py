"""What stands between two stages: graphs, captured modules, their JSON, and running them without a trace."""
