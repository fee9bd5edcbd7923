"""What has no counterpart in the real plugin: the device alias, the graph counter, and fixes for optimum-habana."""
