"""Programs in JavaScript that benchmarks, the table of clients and tests share, and the npm packages that they need."""
