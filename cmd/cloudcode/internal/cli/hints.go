package cli

// reasonHints says what to do about a reason, where the server's own text does
// not know the command line. A reason that is not here has its text alone.
var reasonHints = map[string]string{
	"SESSION_NOT_FOUND":         "see `cloudcode session list`",
	"SESSION_EXISTS":            "take another id, or change the session with `cloudcode session update`",
	"SESSION_NOT_PLACED":        "see why with `cloudcode session get`",
	"SESSION_NOT_STARTED":       "see how far it is with `cloudcode session get`",
	"SESSION_DELETING":          "wait until it is gone; `cloudcode session delete --wait` does",
	"ETAG_MISMATCH":             "it changed meanwhile; try again",
	"REQUEST_ID_REUSED":         "take another --request-id for another session",
	"NODE_NOT_FOUND":            "see `cloudcode node list`",
	"NO_NODES":                  "start one with `cloudcode nodeagent`",
	"NO_READY_NODE":             "see `cloudcode node list`",
	"NO_MATCHING_NODE":          "see the labels of your nodes with `cloudcode node list -o json`, or change --node-selector",
	"NODE_TOO_SMALL":            "ask for less with --cpu, --memory or --disk; `cloudcode node list` shows what nodes have",
	"NODE_UNREACHABLE":          "see `cloudcode node list`; the session comes back with its node",
	"CHECKPOINT_NOT_FOUND":      "see `cloudcode session checkpoints`",
	"PATH_NOT_FOUND":            "a path that does not begin with a slash is relative to /root/s3/workspace/project",
	"SESSION_LOST":              "if its node is gone for good, go on elsewhere with `cloudcode session resume`",
	"SESSION_NOT_RUNNING":       "see why with `cloudcode session get`; one that is suspended starts with `cloudcode session resume`",
	"STORAGE_LOCAL":             "a session gets object storage when it is created; see `cloudcode storage profiles`",
	"STORAGE_PREFIX_IN_USE":     "take another folder with --storage-prefix",
	"STORAGE_PROFILE_NOT_FOUND": "see `cloudcode storage profiles`",
	"IMAGE_NOT_FOUND":           "see `cloudcode image list` on the node; `cloudcode image import FILE` adds one",
}
