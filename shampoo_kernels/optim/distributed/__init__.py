"""Many processes: who owns which blocks (team, sharding), and how replicas (replicas, gathering)
and shards (shards, exchange) work on them together."""
