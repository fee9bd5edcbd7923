"""An adapter folded into its base, shard by shard."""
