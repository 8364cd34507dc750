from orwcfm_fast.cli import main

main()
