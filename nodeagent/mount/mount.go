// Package mount makes a folder of a bucket appear as a file system on the node.
// One implementation is a package below this one; each passes mounttest.
package mount

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Error classes.
var (
	ErrNotFound    = errors.New("not mounted")
	ErrUnavailable = errors.New("mounter is not installed on this machine")
	ErrInvalid     = errors.New("mount cannot be made like this") // asking again cannot help
	ErrFailed      = errors.New("mounting failed")                // the text says why: what the mounter printed
	ErrNotFlushed  = errors.New("not everything could be written to the object store")
	ErrDead        = errors.New("mounter has died")
	ErrDetached    = errors.New("mounter runs, but its mount is gone")
	ErrHung        = errors.New("mount does not answer")
	ErrBusy        = errors.New("mount is still in use")
)

// Spec of one mount. It is self-contained. Secrets are in it.
type Spec struct {
	ID string // of the session's volume; names the mount
	// Point is an absolute folder of the host, made if missing.
	Point string

	Endpoint, Bucket, AccessKeyID, SecretAccessKey, Region string
	PathStyle                                              bool
	Prefix                                                 string // no slashes at its ends; may be empty
	Args                                                   string // further arguments of this mounter
	UID, GID                                               uint32 // that everything belongs to on the host
	LogPath                                                string // what the mounter prints goes here
	// CacheDir is an absolute folder that nobody but the machine's root can reach, for
	// files that the mounter has not written yet: on a disk that the session may fill.
	// Made if missing and removed with the mount; empty: one in the mounter's own folder.
	CacheDir string
	// PublicOnly: the endpoint must not lead to what this machine alone can reach. No
	// mounter can promise that, as they look up names by themselves: it is ErrInvalid.
	PublicOnly bool
}

// Mounter mounts. All methods are safe for concurrent use; calls for one id are
// made one at a time, except Abandon, which ends the others. A mount's process
// outlives ours: List finds it again.
type Mounter interface {
	// Name is `tigrisfs` or `rclone`.
	Name() string
	// Version of the mounter's program. Returns ErrUnavailable if it is not installed.
	Version(ctx context.Context) (string, error)
	// Mount makes the mount, or adopts one that is there, answers, and has the same spec.
	// Another one is unmounted first, one that is dead or hangs is abandoned. It
	// returns once the mount answers. Returns ErrUnavailable, ErrInvalid, ErrFailed,
	// or why another one cannot be unmounted.
	Mount(ctx context.Context, s Spec) error
	// Probe returns nil if the mount answers in time, and why not otherwise: ErrDead,
	// ErrDetached or ErrHung. Returns ErrNotFound if it was never mounted. An object
	// store that is away is none of this: the mounter waits for it.
	Probe(ctx context.Context, id string) error
	// Sync returns once what was written before is in the object store. ErrNotFlushed
	// says what is not.
	Sync(ctx context.Context, id string) error
	// Unmount syncs, unmounts, and waits until the mounter has exited. On
	// ErrNotFlushed, ErrBusy or the end of ctx the mount is still there. What is not
	// mounted is no error.
	Unmount(ctx context.Context, id string) error
	// Abandon kills the mounter and detaches the mount: nothing more of it reaches
	// the object store. It is the fence, and quick. What is not mounted is no error.
	Abandon(ctx context.Context, id string) error
	// List returns the mounts that are there, dead or alive.
	List(ctx context.Context) ([]Status, error)
}

// RemovalsLeftError is an ErrNotFlushed: all is written, and these names, relative to
// the mount, are still to be removed from the object store, if they ever were in it.
// Waiting longer does not help.
type RemovalsLeftError struct{ Names []string }

func (e *RemovalsLeftError) Error() string {
	return fmt.Sprintf("%d names are not removed from the object store: %q", len(e.Names), e.Names[:min(3, len(e.Names))])
}

// Unwrap returns ErrNotFlushed.
func (e *RemovalsLeftError) Unwrap() error { return ErrNotFlushed }

// Remounter is what a Mounter has that keeps unwritten files on disk.
type Remounter interface {
	// Remount is Mount, but what a dead or hung mounter had not written is written by
	// the new one, as far as it is on disk. Only for whoever knows that nobody else
	// has written there meanwhile.
	Remount(ctx context.Context, s Spec) error
}

// Status of a mount.
type Status struct {
	ID    string
	Point string
	PID   int // of the mounter; 0 if it is gone
	Since time.Time
}
