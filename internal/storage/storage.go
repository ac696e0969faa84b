// Package storage says where sessions are kept: which object store, with which
// keys, and which folder of it is whose.
//
// Everything of one Config lies below its Root in the bucket:
//
//	<root>/<prefix>/…               a session's folder; what a mount shows
//	<root>/.cloudcode/v1/…          checkpoints of all sessions; see package checkpoint
//
// A session cannot see .cloudcode: its folder is beside it, or, where its prefix is
// empty, the node hides it.
package storage

// Config is one object store and the keys to it. Secrets are in it: it must not be
// logged or shown.
type Config struct {
	Endpoint        string `json:"endpoint"` // https://host[:port], no path
	Bucket          string `json:"bucket"`
	AccessKeyID     string `json:"access_key_id"`
	SecretAccessKey string `json:"secret_access_key"`
	Region          string `json:"region,omitempty"` // empty: auto
	PathStyle       bool   `json:"path_style,omitempty"`
	Root            string `json:"prefix,omitempty"` // no slash at its ends; may be empty
	TigrisFSArgs    string `json:"tigrisfs_args,omitempty"`
	// EncryptionKey of checkpoints: 32 bytes, or nil for none.
	EncryptionKey []byte `json:"encryption_key,omitempty"`
}

// StateDir is the folder below Root that holds what Cloud Code itself keeps.
const StateDir = ".cloudcode"
