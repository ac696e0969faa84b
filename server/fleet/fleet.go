// Package fleet holds the words of the domain: sessions, nodes, assignments,
// what states a session can have and how it moves between them. It imports the
// standard library only, and knows nothing of storage or transport.
package fleet

import (
	"maps"
	"time"
)

// State of a session, as users see it.
type State string

// The states of a session.
const (
	StatePending  State = "PENDING"  // on no node yet
	StateStarting State = "STARTING" // on a node, not ready
	StateRunning  State = "RUNNING"  // OpenCode answers
	StateFailed   State = "FAILED"   // could not be kept running
	StateLost     State = "LOST"     // its node is gone, and its workspace is only there
	StateDeleting State = "DELETING" // being removed

	StateSuspending State = "SUSPENDING" // being saved before its container ends
	StateSuspended  State = "SUSPENDED"  // no container; starts again when it is resumed
)

// Reasons why a session or node is in its state. They are part of the API:
// never rename one.
const (
	ReasonNoNodes         = "NO_NODES"         // no node has joined
	ReasonNoReadyNode     = "NO_READY_NODE"    // nodes have joined, none is ready
	ReasonNoMatchingNode  = "NO_MATCHING_NODE" // none has the labels asked for
	ReasonTooLarge        = "NODE_TOO_SMALL"   // no node is as large as the limits asked for
	ReasonNodeUnreachable = "NODE_UNREACHABLE"
	ReasonNodeReturned    = "NODE_RETURNED" // after it was unreachable; its report is awaited
	ReasonHeartbeatMissed = "HEARTBEAT_MISSED"
	ReasonPurging         = "STORAGE_PURGING" // deleted, and its object storage is being emptied
)

// Resources limits a session; zero means none.
type Resources struct {
	CPUMillis   int64 `json:"cpu_millis,omitempty"`
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	PIDs        int64 `json:"pids,omitempty"`
	DiskBytes   int64 `json:"disk_bytes,omitempty"`
}

// Spec is what a user asks for.
type Spec struct {
	Image          string            `json:"image,omitempty"`
	Env            map[string]string `json:"env,omitempty"`
	OpenCodeConfig string            `json:"opencode_config,omitempty"`
	Resources      Resources         `json:"resources"`
	NodeSelector   map[string]string `json:"node_selector,omitempty"`
	Storage        Storage           `json:"storage,omitzero"`
}

// Progress says how far a start has come.
type Progress struct {
	Phase   string `json:"phase,omitempty"`
	Detail  string `json:"detail,omitempty"`
	Current int64  `json:"current,omitempty"`
	Total   int64  `json:"total,omitempty"`
}

// Session is one OpenCode server in one container with one workspace.
type Session struct {
	ID         string            `json:"id"`
	UID        string            `json:"uid"`
	Revision   uint64            `json:"revision"` // of the store, when it last changed; the etag
	CreateTime time.Time         `json:"create_time"`
	UpdateTime time.Time         `json:"update_time"`
	Labels     map[string]string `json:"labels,omitempty"`
	Spec       Spec              `json:"spec"`

	// Deleting is asked for once and never taken back.
	Deleting bool `json:"deleting,omitempty"`
	// Purge asks for the session's object storage to be emptied with it.
	Purge bool `json:"purge,omitempty"`
	// StorageSettled says of a session that is being deleted that its object storage
	// knows of it: it is marked as deleted there, or purged.
	StorageSettled bool `json:"storage_settled,omitempty"`
	// Suspended is what was asked for last, by Suspend and Resume.
	Suspended bool `json:"suspended,omitempty"`
	// RestoreCheckpoint is to be taken back to; every assignment carries it until
	// the session has run with it.
	RestoreCheckpoint string `json:"restore_checkpoint,omitempty"`
	// RestoreGeneration tells one request to restore from the next: it is the first
	// generation that can carry it. A node that has done it says so in the bucket, and
	// no later generation does it again, also if we never hear that it ran.
	RestoreGeneration uint64 `json:"restore_generation,omitempty"`

	State    State     `json:"state"`
	Reason   string    `json:"reason,omitempty"`
	Message  string    `json:"message,omitempty"`
	Progress *Progress `json:"progress,omitempty"`

	// Assignment is where the session is; nil while it is on no node.
	Assignment *Assignment `json:"assignment,omitempty"`
	// Generation of the newest assignment there ever was; never goes down.
	Generation uint64 `json:"generation,omitempty"`

	RestartCount    int32     `json:"restart_count,omitempty"`
	ReadyTime       time.Time `json:"ready_time,omitzero"`
	OpenCodeVersion string    `json:"opencode_version,omitempty"`

	// Storage is what nodes have said of the session's object storage; nil: nothing yet.
	Storage *StorageStatus `json:"storage,omitempty"`
}

// Clone returns a copy that shares nothing with s.
func (s *Session) Clone() *Session {
	c := *s
	c.Labels = maps.Clone(s.Labels)
	c.Spec = s.Spec.Clone()
	if s.Progress != nil {
		p := *s.Progress
		c.Progress = &p
	}
	if s.Assignment != nil {
		a := *s.Assignment
		a.Spec = s.Assignment.Spec.Clone()
		c.Assignment = &a
	}
	c.Storage = s.Storage.Clone()
	return &c
}

// WithoutSecrets returns a copy without passwords and keys, for what is kept or
// shown longer than they are needed.
func (s *Session) WithoutSecrets() *Session {
	c := s.Clone()
	c.Spec.Storage.hideSecrets()
	if c.Assignment != nil {
		c.Assignment.Password = ""
		c.Assignment.Spec.Storage.hideSecrets()
	}
	return c
}

// Clone returns a copy that shares nothing with s.
func (s Spec) Clone() Spec {
	s.Env = maps.Clone(s.Env)
	s.NodeSelector = maps.Clone(s.NodeSelector)
	s.Storage = s.Storage.Clone()
	return s
}

// Assignment is (session, node, generation, desired state, spec). Generation is
// the fencing token: every report, event, route and connection carries it, and
// an old one is refused.
type Assignment struct {
	Node       string `json:"node"`
	Generation uint64 `json:"generation"`
	// Delete asks the node to stop the session and to remove its workspace;
	// otherwise it is kept running.
	Delete bool `json:"delete,omitempty"`
	// Suspend asks the node to save the session and to stop it. Delete comes before it.
	Suspend bool `json:"suspend,omitempty"`
	// RestoreCheckpoint is what the node takes the session back to before it starts
	// it, once for each RestoreGeneration; empty: nothing.
	RestoreCheckpoint string `json:"restore_checkpoint,omitempty"`
	RestoreGeneration uint64 `json:"restore_generation,omitempty"`
	Spec              Spec   `json:"spec"`
	// Password of the session's OpenCode: made by the server, known to node and
	// gateways, never shown by the API.
	Password string `json:"password"`
}

// NodeState says whether a node can be used.
type NodeState string

// The states of a node.
const (
	NodeReady    NodeState = "READY"
	NodeNotReady NodeState = "NOT_READY"
)

// NodeInfo is what a node daemon says of its machine.
type NodeInfo struct {
	Version                 string `json:"version,omitempty"`
	Hostname                string `json:"hostname,omitempty"`
	OS                      string `json:"os,omitempty"`
	Architecture            string `json:"architecture,omitempty"`
	KernelVersion           string `json:"kernel_version,omitempty"`
	ContainerRuntimeVersion string `json:"container_runtime_version,omitempty"`
	CPUMillis               int64  `json:"cpu_millis,omitempty"`
	MemoryBytes             int64  `json:"memory_bytes,omitempty"`
	DiskBytes               int64  `json:"disk_bytes,omitempty"`
}

// Node is a machine that runs the node daemon.
type Node struct {
	ID         string            `json:"id"`
	Revision   uint64            `json:"revision"`
	CreateTime time.Time         `json:"create_time"`
	Labels     map[string]string `json:"labels,omitempty"`
	State      NodeState         `json:"state"`
	Reason     string            `json:"reason,omitempty"`
	Message    string            `json:"message,omitempty"`
	Info       NodeInfo          `json:"info"`
	// InstanceID tells two machines apart that claim the same id.
	InstanceID string `json:"instance_id,omitempty"`
	// RegistrationID of the current registration; an expiry or a report of an
	// older one is refused.
	RegistrationID string `json:"registration_id,omitempty"`
	// HeartbeatTime is stored only when the state changes; the newest one is
	// with the dispatcher, in memory.
	HeartbeatTime time.Time `json:"heartbeat_time,omitzero"`
}

// Clone returns a copy that shares nothing with n.
func (n *Node) Clone() *Node {
	c := *n
	c.Labels = maps.Clone(n.Labels)
	return &c
}

// LifecycleEvent is one change of a session that its watchers are told of.
type LifecycleEvent struct {
	Sequence uint64    `json:"sequence"` // per session UID, from 1, without holes
	Time     time.Time `json:"time"`
	Session  *Session  `json:"session"` // after the change; no password
}

// Report is what a node says of one session.
type Report struct {
	SessionID  string
	SessionUID string
	Generation uint64
	State      ReportedState
	Reason     string
	Message    string
	Progress   *Progress

	RestartCount    int32
	ReadyTime       time.Time
	OpenCodeVersion string
	Storage         *StorageStatus // nil: nothing is said
}

// ReportedState is a session's state as its node sees it.
type ReportedState string

// The states a node reports.
const (
	ReportedStarting ReportedState = "STARTING"
	ReportedRunning  ReportedState = "RUNNING"
	ReportedFailed   ReportedState = "FAILED"
	ReportedGone     ReportedState = "GONE" // container and workspace are removed

	ReportedSuspending ReportedState = "SUSPENDING"
	// ReportedSuspended: the container is gone. With object storage so is all else,
	// and it is saved; otherwise the workspace stays.
	ReportedSuspended ReportedState = "SUSPENDED"
)
