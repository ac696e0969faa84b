// Package runtime says what the node daemon needs of whatever runs a session's
// container. One implementation is a package below this one; each passes the
// conformance suite in runtimetest.
package runtime

import (
	"context"
	"errors"
	"io"
	"net"
	"time"
)

// Error classes. An implementation wraps them with %w so that the worker can
// turn them into a state and a reason.
var (
	// ErrNotFound: the session has no container here.
	ErrNotFound = errors.New("container not found")
	// ErrImageNotFound: the image is neither on this machine nor in the registry that its name says.
	ErrImageNotFound = errors.New("image not found")
	// ErrImagePull: the image's registry could not be reached or refused; a later try may work.
	ErrImagePull = errors.New("image pull failed")
	// ErrStaleGeneration: the container here is of a newer generation than the one asked for.
	ErrStaleGeneration = errors.New("a newer generation runs here")
	// ErrInvalidSpec: the spec cannot run on any machine; trying again cannot help.
	ErrInvalidSpec = errors.New("invalid container spec")
	// ErrNoSpace: this machine's disk is full.
	ErrNoSpace = errors.New("no space left on the node")
	// ErrUnavailable: the container runtime itself does not answer; a later try may work.
	ErrUnavailable = errors.New("container runtime unavailable")
)

// Resources limits one container. Zero means no limit.
type Resources struct {
	CPUMillis   int64 // thousandths of one CPU
	MemoryBytes int64
	PIDs        int64
}

// Mount is a folder of the host that appears in the container.
type Mount struct {
	Source      string // absolute, on the host
	Destination string // absolute, in the container
	ReadOnly    bool
	// Propagated makes mounts that appear later below Source appear in the
	// container too (rbind,rslave); otherwise it is a plain rbind,rprivate.
	Propagated bool
}

// Spec is what one container runs. It is self-contained: two calls of Ensure
// with equal specs leave one container.
type Spec struct {
	Session    string            // session id, a DNS label of at most 40 characters without "--"
	Generation uint64            // fencing token of the assignment
	Image      string            // reference of an image
	Args       []string          // empty: the image's entrypoint and command
	Env        map[string]string // added to the image's environment, ours wins
	WorkingDir string            // empty: the image's
	Hostname   string            // empty: the session id
	Resources  Resources
	Mounts     []Mount
	// IDBase is the first of the 65536 host uids and gids that the container's
	// ids 0..65535 map to.
	IDBase uint32
	// ScratchDir, when not empty, is an absolute folder of the host that holds
	// the container's writable layer (overlay upper and work). It is how disk
	// limits work: the caller makes it a file system of limited size. What it
	// holds outlives the container, and the next one has it again, as long as
	// IDBase and the image's layers stay the same.
	ScratchDir string
	// LogDir is an absolute folder of the host; stdout and stderr go there, rotated.
	LogDir string
}

// State of a container.
type State string

// The states of a container.
const (
	StateCreated State = "created"
	StateRunning State = "running"
	StatePaused  State = "paused"
	StateExited  State = "exited"
)

// Instance is one container as it is now.
type Instance struct {
	Session     string
	Generation  uint64
	ID          string // container id in the runtime
	State       State
	PID         int // of the container's first process on the host; 0 when it does not run
	ImageDigest string
	Spec        Spec // as given to Ensure; how a restarted node daemon learns what it adopts. Env included.
	StartedAt   time.Time
	Exit        *Exit // set when State is StateExited
}

// Exit says how a container ended.
type Exit struct {
	Code      int // 128+n when signal n ended it
	OOMKilled bool
	At        time.Time
}

// Phase of a start, in this order.
type Phase string

// Phases of a start.
const (
	PhaseImage     Phase = "image"     // pulling and unpacking the image
	PhaseContainer Phase = "container" // creating snapshot, network and process
)

// Progress of a long call.
type Progress struct {
	Phase   Phase
	Detail  string // one line for a person
	Current int64  // bytes; 0 when not known
	Total   int64  // bytes; 0 when not known
}

// Hooks are called by Ensure, from its own goroutine. Each may be nil.
type Hooks struct {
	Progress func(Progress)
	// Creating is called when the session has no container any more and the next
	// one is about to be made. An error ends the start.
	Creating func(ctx context.Context) error
	// Created is called when a new container's mounts and namespaces exist and
	// nothing of it has run yet: what is mounted below a Propagated mount's source
	// now, the container sees from its first moment. An error ends the start.
	Created func(ctx context.Context) error
}

// Report tells of progress; h may be nil.
func (h *Hooks) Report(p Progress) {
	if h != nil && h.Progress != nil {
		h.Progress(p)
	}
}

// BeforeCreate calls Creating; h may be nil.
func (h *Hooks) BeforeCreate(ctx context.Context) error {
	if h == nil || h.Creating == nil {
		return nil
	}
	return h.Creating(ctx)
}

// AfterCreate calls Created; h may be nil.
func (h *Hooks) AfterCreate(ctx context.Context) error {
	if h == nil || h.Created == nil {
		return nil
	}
	return h.Created(ctx)
}

// Image that can start without being pulled.
type Image struct {
	Name      string
	Digest    string
	SizeBytes int64
	CreatedAt time.Time
}

// Runtime runs containers. All methods are safe for concurrent use; calls for
// one session are made one at a time by its worker, except Dial, Wait and List.
type Runtime interface {
	// Ensure brings the container of spec.Session to spec and returns it
	// running. It is idempotent: what runs already with an equal spec is left
	// alone, and so is what differs in Generation or Resources only, which are
	// changed in place. Anything else is stopped, removed and made anew. A
	// paused container is resumed. hooks may be nil.
	//
	// Returns ErrStaleGeneration, ErrImageNotFound, ErrImagePull,
	// ErrInvalidSpec, ErrNoSpace or ErrUnavailable. On an error nothing that
	// this call made is left behind, unless ctx ended: then List or the next
	// Ensure cleans up.
	Ensure(ctx context.Context, spec Spec, hooks *Hooks) (Instance, error)
	// Pause freezes all processes. Returns ErrNotFound.
	Pause(ctx context.Context, session string) error
	// Resume thaws. Returns ErrNotFound.
	Resume(ctx context.Context, session string) error
	// Stop sends SIGTERM, waits up to grace, sends SIGKILL, and removes
	// container, snapshot, network namespace and addresses. A session without a
	// container is no error. Logs stay.
	Stop(ctx context.Context, session string, grace time.Duration) error
	// Kill is Stop without the grace.
	Kill(ctx context.Context, session string) error
	// Wait returns when the container's process has ended; the container stays
	// until Stop. Returns ErrNotFound.
	Wait(ctx context.Context, session string) (Exit, error)
	// List returns every container of this node daemon, running or not: how a
	// restarted daemon finds what it adopts. It also removes half-made leftovers
	// of a daemon that died while making or removing one.
	List(ctx context.Context) ([]Instance, error)
	// Dial connects to a TCP port on the loopback interface inside the
	// container's network namespace, so that servers need not listen on an
	// address that a neighbour could reach. Returns ErrNotFound.
	Dial(ctx context.Context, session string, port uint16) (net.Conn, error)

	// ImportImage reads an OCI or Docker archive. name, when not empty, is the
	// reference it gets; otherwise the archive says.
	ImportImage(ctx context.Context, archive io.Reader, name string, report func(Progress)) (Image, error)
	// Images lists what can start without a pull.
	Images(ctx context.Context) ([]Image, error)

	// Close lets go of the runtime; containers go on running.
	Close() error
}
