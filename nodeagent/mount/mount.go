// Package mount makes a folder of a bucket appear as a file system on the node.
// One implementation is a package below this one; each passes mounttest.
package mount

import (
	"context"
	"errors"
	"time"
)

// Error classes.
var (
	ErrNotFound    = errors.New("not mounted")
	ErrUnavailable = errors.New("mounter is not installed on this machine")
	ErrFailed      = errors.New("mounting failed") // the text says why: what the mounter printed
	ErrNotFlushed  = errors.New("not everything could be written to the object store")
)

// Spec of one mount. It is self-contained. Secrets are in it.
type Spec struct {
	ID string // of the session's volume; names the mount
	// Point is an absolute folder of the host, made if missing.
	Point string

	Endpoint, Bucket, AccessKeyID, SecretAccessKey, Region string
	PathStyle                                              bool
	Prefix                                                 string // no slashes at its ends; may be empty
	Args                                                   string // further arguments of the mounter
	UID, GID                                               uint32 // that everything belongs to on the host
	LogPath                                                string // what the mounter prints goes here
}

// Mounter mounts. All methods are safe for concurrent use; calls for one id are
// made one at a time. A mount's process outlives ours: List finds it again.
type Mounter interface {
	// Name is `tigrisfs` or `rclone`.
	Name() string
	// Version of the mounter's program. Returns ErrUnavailable if it is not installed.
	Version(ctx context.Context) (string, error)
	// Mount makes the mount, or adopts one that is there, answers, and has the same spec.
	// Another one is unmounted first. It returns once the mount answers.
	// Returns ErrUnavailable or ErrFailed.
	Mount(ctx context.Context, s Spec) error
	// Probe returns nil if the mount answers in time, and why not otherwise: its
	// process is gone, it is not mounted, or it hangs. Returns ErrNotFound if it
	// was never mounted.
	Probe(ctx context.Context, id string) error
	// Sync returns once what was written is in the object store. ErrNotFlushed says what is not.
	Sync(ctx context.Context, id string) error
	// Unmount syncs, unmounts, and waits until the mounter has exited. On
	// ErrNotFlushed or the end of ctx the mount is still there. What is not mounted is no error.
	Unmount(ctx context.Context, id string) error
	// Abandon kills the mounter and detaches the mount: nothing more of it reaches
	// the object store. It is the fence, and quick. What is not mounted is no error.
	Abandon(ctx context.Context, id string) error
	// List returns the mounts that are there, dead or alive.
	List(ctx context.Context) ([]Status, error)
}

// Status of a mount.
type Status struct {
	ID    string
	Point string
	PID   int // of the mounter; 0 if it is gone
	Since time.Time
}
