# The project's own environment is in .venv; another place or another Python: make test VENV=folder PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
SLICE ?= 5
TESTERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv table2 tables fusion test figures real maps decisions readme docs dist clean

help:
	@echo "make table2   set everything up and make Table 2 of the demo's slice $(SLICE) (make table2 SLICE=0 for another)"
	@echo "make tables   every table and figure of the paper, on the demo (SLICES=5 for one slice)"
	@echo "make fusion   every table and figure of FusionCLIP-AD, on the demo"
	@echo "make test     set everything up and run every notebook and every test"
	@echo "make venv     set everything up in $(VENV), about 6 GB"
	@echo "make figures  run what README and results page show, and write their tables and pictures anew"
	@echo "make real     decisions and Table 2 on real images: REAL='folder folder ...' (data/00_folder); make maps: Table 1"
	@echo "make readme   write README.md from nbs/index.ipynb"
	@echo "make docs     build the documentation site in _docs: every notebook, every module, searchable offline"
	@echo "make dist     build the sdist and the wheel in dist, and check them"
	@echo "make clean    remove $(VENV) and what can be made again; results/ stays"

# Done once, and again when the requirements or the packaging change.
$(STAMP): settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "sdmad_nb needs Python 3.10 or later, and\
	 '$(PYTHON)' is not: name another, as in make table2 PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --use-pep517 -e '.[dev]'
	@touch $@

venv: $(STAMP)

table2: $(STAMP)
	$(BIN)/papermill nbs/run_table2.ipynb -p slice $(SLICE)

# Exports in sync, nbdev_test on each library notebook, papermill -p smoke True on each experiment:
# tests/test_notebooks.py, tests/test_experiments.py
test: $(STAMP)
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile tests

# Runs are shared: Table 3 reads the records that Table 2 has made, and a second `make tables` reads all of them.
# A quick look: make tables SLICES=5 SMOKE=True RESULTS=folder
SLICES ?= 0 5 10
SMOKE ?= False
RESULTS ?=
RUN = $(BIN)/papermill
WITH = -p smoke $(SMOKE) $(if $(RESULTS),-p results $(RESULTS))
tables: $(STAMP)
	$(RUN) nbs/run_fig1.ipynb $(WITH)
	$(RUN) nbs/run_table1.ipynb $(WITH)
	for slice in $(SLICES); do $(RUN) nbs/run_table2.ipynb -p slice $$slice $(WITH) || exit 1; done
	for slice in $(SLICES); do $(RUN) nbs/run_table3.ipynb -p slice $$slice $(WITH) || exit 1; done
	$(RUN) nbs/run_fig3.ipynb $(WITH)
	$(RUN) nbs/run_fig4.ipynb $(WITH)

# Table 1 first, whose records and tokens the others read; these then go two at a time, a core for each
REST = fig4 table2 table3 fig5 fig6 fig7
fusion: $(STAMP)
	$(RUN) nbs/run_fusion_table1.ipynb $(WITH)
	printf '%s\n' $(REST) | OMP_NUM_THREADS=1 xargs -P 2 -I {} $(RUN) nbs/run_fusion_{}.ipynb $(WITH) --no-progress-bar

# A picture for a screen, where the one for print has several megabytes
SMALLER = $(BIN)/python -c 'import sys; from PIL import Image; picture = Image.open(sys.argv[1]); \
	picture.thumbnail((1500, 1500)); picture.convert("RGB").quantize(200).save(sys.argv[2])'

# The tables and pictures of the README and of the results page: made from the records of these runs, never typed
BESIDE = parts beyond decisions losses calibration
SMALL = table1 table2 table3 fusion_table1 fusion_table2 fusion_table3
DRAWN = fig3/demo-slice5:fig3 fig4/demo-slice5-signs:fig4-signs
PICTURES = fig1/demo-slice5:fig1 $(DRAWN) $(DRAWN:%=small/%-small) \
	fig4/demo-slice5-where:fig4-where table1/demo-slice5-maps:table1-maps table2/demo-slice5:table2 \
	table2/demo-slice5-images:table2-images decisions/decisions:decisions calibration/demo-slice5:calibration
figures: tables fusion
	for name in $(BESIDE); do $(RUN) nbs/run_$$name.ipynb || exit 1; done
	for name in $(SMALL) fig3 fig4; do $(RUN) nbs/run_$$name.ipynb -p backbone small -p results results/small || exit 1; done
	mkdir -p nbs/figures
	for name in table1 table2 table3 fusion_table1 fusion_table2 fusion_table3 $(BESIDE); do \
	  cp results/$$name/table.md nbs/figures/$$(echo $$name | tr _ -).md || exit 1; done
	for name in $(SMALL); do cp results/small/$$name/table.md nbs/figures/$$(echo $$name | tr _ -)-small.md || exit 1; done
	for name in findings goals differences ridge; do \
	  cp results/decisions/$$name/table.md nbs/figures/decisions-$$name.md || exit 1; done
	for pair in $(PICTURES); do $(SMALLER) results/$${pair%:*}.png nbs/figures/$${pair#*:}.png || exit 1; done
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/index.ipynb nbs/results.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python tests/readme.py

# The same page's tables of real images, from folders that you have: make real REAL='folders/chest folders/fundus' SHOTS='1, 4'.
# Each folder's last name is that of its tables. One finding, masks, few patients: make maps REAL=folders/flair
SHOTS ?= 1
SEEDS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
real: decisions
	for folder in $(REAL); do for shots in $$(echo '$(SHOTS)' | tr -d ,); do name=real-$$(basename $$folder); \
	  $(RUN) nbs/run_table2.ipynb -p data $$folder -p shots $$shots -y 'seeds: $(SEEDS)' -p results results/$$name && \
	  cp results/$$name/table2/table.md nbs/figures/$$name-table2-k$$shots.md && \
	  cp results/$$name/table2/intervals/table.md nbs/figures/$$name-intervals-k$$shots.md || exit 1; done; done

maps: decisions
	for folder in $(REAL); do name=real-$$(basename $$folder); \
	  $(RUN) nbs/run_table1.ipynb -p data $$folder -y '{each_patient: True, seeds: [0, 1, 2]}' -p results results/$$name && \
	  cp results/$$name/table1/table.md nbs/figures/$$name-table1.md || exit 1; \
	  for number in 1 2; do $(RUN) nbs/run_fusion_table$$number.ipynb -p data $$folder \
	    -y '{each_patient: True, seeds: [0]}' -p results results/$$name && \
	    cp results/$$name/fusion_table$$number/table.md nbs/figures/$$name-fusion-table$$number.md || exit 1; done; done

decisions: $(STAMP)
	for folder in $(REAL); do name=real-$$(basename $$folder); \
	  $(RUN) nbs/run_decisions.ipynb -y "{draws: [], data: ['$$folder'], seeds: $(SEEDS), shot_counts: [$(SHOTS)]}" \
	    -p results results/$$name && cp results/$$name/decisions/table.md nbs/figures/$$name.md && \
	    cp results/$$name/decisions/differences/table.md nbs/figures/$$name-differences.md || exit 1; done

readme: $(STAMP)
	$(BIN)/python tests/readme.py

# Needs no connection, and runs no notebook: what is shown is what is stored. A link that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/python docs/build.py _docs

dist: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf cache build dist _docs _proc *.egg-info .pytest_cache
	find nbs sdmad_nb tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
	test ! -e $(STAMP) || rm -rf $(VENV)
