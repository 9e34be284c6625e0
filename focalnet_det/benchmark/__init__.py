"""Speed and memory beside other libraries. The library itself never imports this package."""
