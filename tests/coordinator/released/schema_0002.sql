BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE case_tags (
	tag VARCHAR(100) NOT NULL, 
	case_name VARCHAR(100) NOT NULL, 
	CONSTRAINT pk_case_tags PRIMARY KEY (tag, case_name), 
	CONSTRAINT fk_case_tags_case_name FOREIGN KEY(case_name) REFERENCES cases (name) ON DELETE CASCADE
);
INSERT INTO "case_tags" VALUES('smoke','first');
INSERT INTO "case_tags" VALUES('llama','first');
CREATE TABLE cases (
	name VARCHAR(100) NOT NULL, 
	revision BIGINT NOT NULL, 
	document TEXT NOT NULL, 
	CONSTRAINT pk_cases PRIMARY KEY (name)
);
INSERT INTO "cases" VALUES('first',2,'{"kind": "dualtrace.case", "case_schema_version": "1.0", "question": {"kind": "ROLLING_LOGPROB", "inputs": [{"text": "a b", "ids": null}], "prefix": {"kind": null, "token_id": null}, "max_tokens": null, "stride": null, "top_k": 0, "variants": [{"view": {"face": "scaled", "adapter": "a", "strength": 0.5, "noise": null}, "mask": null, "allow_leak": false}], "deterministic": false}, "name": "first", "left": {"target": "backend:a", "variant": {"view": {"face": "scaled", "adapter": "a", "strength": 0.25, "noise": null}, "mask": null, "allow_leak": false}}, "right": {"target": "run:run-1", "variant": {"view": {"face": "base", "adapter": "", "strength": 1.0, "noise": null}, "mask": null, "allow_leak": false}}, "tolerance": {"name": "request", "abs_epsilon": 0.0001, "rel_epsilon": 1e-05, "source": "given by the caller"}, "policy": {"max_token_mismatches": 0, "score_max_abs_diff": 0.02, "score_mean_abs_diff": 0.01, "p95_latency_ratio": 1.25, "min_latency_samples": 20, "latency_required": false, "max_failure_rate": 0.0}, "tags": ["smoke", "llama"], "description": "changed"}');
CREATE TABLE comparisons (
	comparison_id VARCHAR(30) NOT NULL, 
	created VARCHAR(40) NOT NULL, 
	left_run_id VARCHAR(30), 
	right_run_id VARCHAR(30), 
	left_target TEXT NOT NULL, 
	right_target TEXT NOT NULL, 
	question_kind VARCHAR(40) NOT NULL, 
	verdict VARCHAR(40) NOT NULL, 
	case_name VARCHAR(100) NOT NULL, 
	first_divergence_index INTEGER, 
	max_token_abs_diff DOUBLE, 
	document TEXT NOT NULL, 
	CONSTRAINT pk_comparisons PRIMARY KEY (comparison_id), 
	CONSTRAINT fk_comparisons_left_run_id FOREIGN KEY(left_run_id) REFERENCES runs (run_id), 
	CONSTRAINT fk_comparisons_right_run_id FOREIGN KEY(right_run_id) REFERENCES runs (run_id)
);
INSERT INTO "comparisons" VALUES('cmp-00000000000000000000000000','2026-03-01T12:30:05.250000Z','run-00000000000000000000000001','run-00000000000000000000000002','backend:a','backend:b','ROLLING_LOGPROB','ERROR','first',NULL,NULL,'{"kind":"dualtrace.comparison","score_debug_schema_version":"1.0","question":{"kind":"ROLLING_LOGPROB","inputs":[{"text":"a b","ids":null}],"prefix":{"kind":null,"token_id":null},"max_tokens":null,"stride":null,"top_k":0,"variants":[{"view":{"face":"scaled","adapter":"a","strength":0.5,"noise":null},"mask":null,"allow_leak":false}],"deterministic":false},"created":"2026-03-01T12:30:05.250000Z","left":{"target":"backend:a","variant":{"view":{"face":"base","adapter":"","strength":1.0,"noise":null},"mask":null,"allow_leak":false},"provenance":{"model_id":"m","revision":"","family":"llama","weights_digest":"sha256:1","tokenizer_digest":"sha256:2","framework":"reference","framework_version":"1","dtype":"float64","matmul_precision":"float64","device":"cpu","attention_implementation":"dense","adapter_digests":[["a","sha256:3"]],"synthetic":false},"identity":"sha256:x","usage":{"prompt_tokens":3,"computed_tokens":3},"execution":null,"total_seconds":0.5,"mrr":1.0,"rank1_share":1.0,"delta_modules":[],"problem":{"code":"INTERNAL","reason":"ENGINE_FAILED","field":"","message":"it fell over","allowed":""}},"right":{"target":"backend:b","variant":{"view":{"face":"base","adapter":"","strength":1.0,"noise":null},"mask":null,"allow_leak":false},"provenance":{"model_id":"m","revision":"","family":"llama","weights_digest":"sha256:1","tokenizer_digest":"sha256:2","framework":"reference","framework_version":"1","dtype":"float64","matmul_precision":"float64","device":"cpu","attention_implementation":"dense","adapter_digests":[["a","sha256:3"]],"synthetic":false},"identity":"sha256:x","usage":{"prompt_tokens":3,"computed_tokens":3},"execution":null,"total_seconds":0.5,"mrr":1.0,"rank1_share":1.0,"delta_modules":[],"problem":{"code":"INTERNAL","reason":"ENGINE_FAILED","field":"","message":"it fell over","allowed":""}},"provenance_differences":[],"tolerance":null,"policy":{"max_token_mismatches":0,"score_max_abs_diff":0.02,"score_mean_abs_diff":0.01,"p95_latency_ratio":1.25,"min_latency_samples":20,"latency_required":false,"max_failure_rate":0.0},"verdict":"ERROR","reasons":["both sides failed"],"gates":[{"gate":"TOKEN_PARITY","verdict":"NOT_APPLICABLE","threshold":null,"value":null,"reason":"nothing to hold"},{"gate":"SCORE_PARITY","verdict":"NOT_APPLICABLE","threshold":null,"value":null,"reason":"nothing to hold"},{"gate":"LATENCY","verdict":"NOT_APPLICABLE","threshold":null,"value":null,"reason":"nothing to hold"},{"gate":"FAILURE_RATE","verdict":"NOT_APPLICABLE","threshold":null,"value":null,"reason":"nothing to hold"},{"gate":"RECEIPTS","verdict":"NOT_APPLICABLE","threshold":null,"value":null,"reason":"nothing to hold"}],"tokens":null,"items":[],"distributions":[],"scores":null,"labels":[],"benchmark":null,"reproduce":"dualtrace compare a b"}');
CREATE TABLE facts (
	name VARCHAR(100) NOT NULL, 
	value TEXT NOT NULL, 
	CONSTRAINT pk_facts PRIMARY KEY (name)
);
INSERT INTO "facts" VALUES('page_token_key','0000000000000000000000000000000000000000000000000000000000000000');
CREATE TABLE job_events (
	job_id VARCHAR(30) NOT NULL, 
	sequence BIGINT NOT NULL, 
	state VARCHAR(40) NOT NULL, 
	run_id VARCHAR(30), 
	comparison_id VARCHAR(30), 
	problem TEXT, 
	message TEXT NOT NULL, 
	done BIGINT NOT NULL, 
	total BIGINT NOT NULL, 
	unit VARCHAR(100) NOT NULL, 
	CONSTRAINT pk_job_events PRIMARY KEY (job_id, sequence), 
	CONSTRAINT fk_job_events_job_id FOREIGN KEY(job_id) REFERENCES jobs (job_id)
);
INSERT INTO "job_events" VALUES('job-01m7zbjgp68vh4w0mfd1gj2xz8',1,'RUNNING','run-00000000000000000000000001',NULL,NULL,'half',1,2,'tokens');
INSERT INTO "job_events" VALUES('job-01m7zbjgp68vh4w0mfd1gj2xz8',2,'FAILED','run-00000000000000000000000001',NULL,'{"code": "INTERNAL", "reason": "BUG", "field": "", "message": "it broke", "allowed": ""}','',0,0,'');
CREATE TABLE jobs (
	job_id VARCHAR(30) NOT NULL, 
	request_id VARCHAR(100) NOT NULL, 
	created VARCHAR(40) NOT NULL, 
	state VARCHAR(40) NOT NULL, 
	last_sequence BIGINT NOT NULL, 
	run_id VARCHAR(30), 
	comparison_id VARCHAR(30), 
	problem TEXT, 
	work TEXT NOT NULL, 
	CONSTRAINT pk_jobs PRIMARY KEY (job_id), 
	CONSTRAINT uq_jobs_request_id UNIQUE (request_id), 
	CONSTRAINT fk_jobs_run_id FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	CONSTRAINT fk_jobs_comparison_id FOREIGN KEY(comparison_id) REFERENCES comparisons (comparison_id)
);
INSERT INTO "jobs" VALUES('job-01m7zbjgp68vh4w0mfd1gj2xz8','request-1','2026-11-21T15:28:36.550345Z','FAILED',2,'run-00000000000000000000000001',NULL,'{"code": "INTERNAL", "reason": "BUG", "field": "", "message": "it broke", "allowed": ""}','the work');
INSERT INTO "jobs" VALUES('job-01m7zbjgphnzxa5xmajm7adprc','request-2','2026-11-21T15:28:36.561042Z','WAITING',0,NULL,NULL,NULL,'other work');
CREATE TABLE retired_cases (
	name VARCHAR(100) NOT NULL, 
	revision BIGINT NOT NULL, 
	CONSTRAINT pk_retired_cases PRIMARY KEY (name)
);
INSERT INTO "retired_cases" VALUES('gone',1);
CREATE TABLE runs (
	run_id VARCHAR(30) NOT NULL, 
	created VARCHAR(40) NOT NULL, 
	mode VARCHAR(40) NOT NULL, 
	target TEXT NOT NULL, 
	model_id TEXT NOT NULL, 
	framework TEXT NOT NULL, 
	question_kind VARCHAR(40) NOT NULL, 
	identity VARCHAR(71) NOT NULL, 
	complete BOOLEAN NOT NULL, 
	synthetic BOOLEAN NOT NULL, 
	raw_request_ref VARCHAR(71), 
	raw_response_ref VARCHAR(71), 
	document TEXT NOT NULL, 
	CONSTRAINT pk_runs PRIMARY KEY (run_id)
);
INSERT INTO "runs" VALUES('run-00000000000000000000000001','2026-03-01T12:30:05.250000Z','SCORE','backend:a','m','reference','ROLLING_LOGPROB','sha256:b1f80b26bccb146d8b45cc50f9a143fd4c8070d61f7ee6f5c89e5dbe95c9cfc2',1,0,NULL,NULL,'{"kind": "dualtrace.run_record", "score_debug_schema_version": "1.0", "run_id": "run-00000000000000000000000001", "mode": "SCORE", "target": "backend:a", "benchmark": null, "config_hash": "sha256:c", "input_hash": "sha256:i", "mask_hash": "", "mask_shape": "", "mrr": 1.0, "rank1_share": 1.0, "raw_request_ref": "", "raw_response_ref": "", "synthetic": false, "run": {"kind": "dualtrace.run", "score_debug_schema_version": "1.0", "created": "2026-03-01T12:30:05.250000Z", "target": "backend:a", "question": {"kind": "ROLLING_LOGPROB", "inputs": [{"text": "a b", "ids": null}], "prefix": {"kind": null, "token_id": null}, "max_tokens": null, "stride": null, "top_k": 0, "variants": [{"view": {"face": "base", "adapter": "", "strength": 1.0, "noise": null}, "mask": null, "allow_leak": false}], "deterministic": false}, "provenance": {"model_id": "m", "revision": "", "family": "llama", "weights_digest": "sha256:1", "tokenizer_digest": "sha256:2", "framework": "reference", "framework_version": "1", "dtype": "float64", "matmul_precision": "float64", "device": "cpu", "attention_implementation": "dense", "adapter_digests": [["a", "sha256:3"]], "synthetic": false, "digest": "sha256:09b72ae4b71b51669e85168f6199a1aeb8444a604e9270c563079763d65ac07e"}, "identity": "sha256:b1f80b26bccb146d8b45cc50f9a143fd4c8070d61f7ee6f5c89e5dbe95c9cfc2", "items": [{"item": 0, "variant": 0, "prefix_token_id": null, "prompt_tokens": 0, "scored_start": 1, "boundary_token_merged": false, "windows": null, "tokens": [{"hex": "f09f"}, "t", "t"], "token_ids": [0, 1, 2], "char_starts": null, "char_ends": null, "token_logprobs": [null, -0.5, -0.5], "token_nll": [null, 0.5, 0.5], "token_ranks": [null, 1, 1], "token_ties": [null, 0, 0], "token_kl_base_masked": null, "token_kl_masked_base": null, "token_candidates": {"1": {"1": -0.5, "7": -1.5}}, "total_logprob": -1.0, "mean_logprob": -0.5, "perplexity": 1.6487212707001282, "is_greedy": true, "mrr": 1.0, "rank1_share": 1.0, "applied": null, "document_starts": [], "delta_modules": ["q_proj"], "problem": null}], "usage": {"prompt_tokens": 3, "computed_tokens": 3}, "execution": {"queue_seconds": 0.1, "tokenize_seconds": 0.2, "compute_seconds": 0.3, "total_seconds": 0.6, "batches": 1, "computed_tokens": 3, "shared_tokens": 0, "step_tokens": 0, "deterministic": false, "buckets": [], "padded_tokens": 0, "server_version": ""}, "complete": true}, "token_debug": null}');
INSERT INTO "runs" VALUES('run-00000000000000000000000002','2026-03-01T12:30:05.250000Z','BENCHMARK','backend:b','m','reference','ROLLING_LOGPROB','sha256:b1f80b26bccb146d8b45cc50f9a143fd4c8070d61f7ee6f5c89e5dbe95c9cfc2',1,1,NULL,NULL,'{"kind": "dualtrace.run_record", "score_debug_schema_version": "1.0", "run_id": "run-00000000000000000000000002", "mode": "BENCHMARK", "target": "backend:b", "benchmark": {"source": "mock", "concurrency": 2, "warm_up_ms": [9.5], "latencies_ms": [1.0, 2.5], "failures": 1, "first_failure": {"code": "INTERNAL", "reason": "ENGINE_FAILED", "field": "", "message": "it fell over", "allowed": ""}, "p50_ms": 1.0, "p95_ms": 2.5, "p99_ms": 2.5, "failure_rate": 0.3333333333333333, "calls_per_second": 12.5, "tokens_per_second": 1600.0}, "config_hash": "sha256:c", "input_hash": "sha256:i", "mask_hash": "sha256:m", "mask_shape": "[3,3]", "mrr": 1.0, "rank1_share": 1.0, "raw_request_ref": "", "raw_response_ref": "", "synthetic": true, "run": {"kind": "dualtrace.run", "score_debug_schema_version": "1.0", "created": "2026-03-01T12:30:05.250000Z", "target": "backend:b", "question": {"kind": "ROLLING_LOGPROB", "inputs": [{"text": "a b", "ids": null}], "prefix": {"kind": null, "token_id": null}, "max_tokens": null, "stride": null, "top_k": 0, "variants": [{"view": {"face": "base", "adapter": "", "strength": 1.0, "noise": null}, "mask": null, "allow_leak": false}], "deterministic": false}, "provenance": {"model_id": "m", "revision": "", "family": "llama", "weights_digest": "sha256:1", "tokenizer_digest": "sha256:2", "framework": "reference", "framework_version": "1", "dtype": "float64", "matmul_precision": "float64", "device": "cpu", "attention_implementation": "dense", "adapter_digests": [["a", "sha256:3"]], "synthetic": false, "digest": "sha256:09b72ae4b71b51669e85168f6199a1aeb8444a604e9270c563079763d65ac07e"}, "identity": "sha256:b1f80b26bccb146d8b45cc50f9a143fd4c8070d61f7ee6f5c89e5dbe95c9cfc2", "items": [{"item": 0, "variant": 0, "prefix_token_id": null, "prompt_tokens": 0, "scored_start": 1, "boundary_token_merged": false, "windows": null, "tokens": [{"hex": "f09f"}, "t", "t"], "token_ids": [0, 1, 2], "char_starts": null, "char_ends": null, "token_logprobs": [null, -0.5, -0.5], "token_nll": [null, 0.5, 0.5], "token_ranks": [null, 1, 1], "token_ties": [null, 0, 0], "token_kl_base_masked": null, "token_kl_masked_base": null, "token_candidates": {"1": {"1": -0.5, "7": -1.5}}, "total_logprob": -1.0, "mean_logprob": -0.5, "perplexity": 1.6487212707001282, "is_greedy": true, "mrr": 1.0, "rank1_share": 1.0, "applied": null, "document_starts": [], "delta_modules": ["q_proj"], "problem": null}], "usage": {"prompt_tokens": 3, "computed_tokens": 3}, "execution": {"queue_seconds": 0.1, "tokenize_seconds": 0.2, "compute_seconds": 0.3, "total_seconds": 0.6, "batches": 1, "computed_tokens": 3, "shared_tokens": 0, "step_tokens": 0, "deterministic": false, "buckets": [], "padded_tokens": 0, "server_version": ""}, "complete": true}, "token_debug": {"kind": "dualtrace.run", "score_debug_schema_version": "1.0", "created": "2026-03-01T12:30:05.250000Z", "target": "backend:a", "question": {"kind": "TOKENIZE", "inputs": [{"text": "a b", "ids": null}], "special_tokens": false}, "provenance": {"model_id": "m", "revision": "", "family": "llama", "weights_digest": "sha256:1", "tokenizer_digest": "sha256:2", "framework": "reference", "framework_version": "1", "dtype": "float64", "matmul_precision": "float64", "device": "cpu", "attention_implementation": "dense", "adapter_digests": [["a", "sha256:3"]], "synthetic": false, "digest": "sha256:09b72ae4b71b51669e85168f6199a1aeb8444a604e9270c563079763d65ac07e"}, "identity": "sha256:10587c4138f0cd3b4f4f96cc536d1df17d753263ee1327950ddfed123004a468", "results": [{"item": 0, "tokens": ["a", " b"], "token_ids": [1, 2], "char_starts": [0, 1], "char_ends": [1, 3], "problem": null}], "usage": {"prompt_tokens": 3, "computed_tokens": 3}, "execution": {"queue_seconds": 0.1, "tokenize_seconds": 0.2, "compute_seconds": 0.3, "total_seconds": 0.6, "batches": 1, "computed_tokens": 3, "shared_tokens": 0, "step_tokens": 0, "deterministic": false, "buckets": [], "padded_tokens": 0, "server_version": ""}, "complete": true}}');
CREATE INDEX ix_runs_identity_run_id ON runs (identity, run_id);
CREATE INDEX ix_runs_target_run_id ON runs (target, run_id);
CREATE INDEX ix_comparisons_case_name_comparison_id ON comparisons (case_name, comparison_id);
CREATE INDEX ix_comparisons_verdict_comparison_id ON comparisons (verdict, comparison_id);
CREATE INDEX ix_case_tags_case_name ON case_tags (case_name);
CREATE INDEX ix_jobs_state ON jobs (state);
COMMIT;
