package fleet

import (
	"log/slog"
	"path"
	"slices"
	"time"
)

// StorageMode says how a session's files are kept.
type StorageMode string

// The modes of storage. A stored session never has AUTO.
const (
	ModeAuto     StorageMode = "AUTO"
	ModeLocal    StorageMode = "LOCAL"    // on the disk of one node
	ModeMount    StorageMode = "MOUNT"    // on the bucket itself
	ModeSnapshot StorageMode = "SNAPSHOT" // on a node's disk, with checkpoints in the bucket
)

// Storage says where a session's files and chats are kept. It is decided when
// the session is made; only the keys in S3 change later.
type Storage struct {
	// Mode is empty for sessions that were made before there was a choice: they are
	// as with ModeLocal.
	Mode StorageMode `json:"mode,omitempty"`
	// Profile of the server; empty with LOCAL and with S3.
	Profile string `json:"profile,omitempty"`
	// Prefix is the session's folder below Root; empty: all of it.
	Prefix string `json:"prefix,omitempty"`
	// Where that is. It is kept although the profile says it too, because that may
	// lead elsewhere later.
	Endpoint string `json:"endpoint,omitempty"`
	Bucket   string `json:"bucket,omitempty"`
	Root     string `json:"root,omitempty"`
	// Region as it was found out where the configuration says `auto`.
	Region string `json:"region,omitempty"`
	// S3 is object storage of the session's own; nil: that of the profile.
	S3 *S3 `json:"s3,omitempty"`
}

// S3 is a bucket and the keys to it.
type S3 struct {
	Endpoint        string `json:"endpoint"`
	Bucket          string `json:"bucket"`
	AccessKeyID     string `json:"access_key_id"`
	SecretAccessKey string `json:"secret_access_key"`
	Region          string `json:"region,omitempty"`
	PathStyle       bool   `json:"path_style,omitempty"`
	Prefix          string `json:"prefix,omitempty"`
	TigrisFSArgs    string `json:"tigrisfs_args,omitempty"`
}

// String tells which object store it is, without the secret key.
func (s S3) String() string { return "s3://" + path.Join(s.Bucket, s.Prefix) + " at " + s.Endpoint }

// GoString is for %#v, and for what S3 is a part of.
func (s S3) GoString() string { return "fleet.S3{" + s.String() + "}" }

// LogValue shows what String does: logs would take it apart.
func (s S3) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Remote says whether the session is kept in object storage, so that it survives
// its node.
func (s Storage) Remote() bool { return s.Mode == ModeMount || s.Mode == ModeSnapshot }

// URI of the session's folder; empty if it has none.
func (s Storage) URI() string {
	if !s.Remote() {
		return ""
	}
	return "s3://" + path.Join(s.Bucket, s.Root, s.Prefix)
}

// Clone returns a copy that shares nothing with s.
func (s Storage) Clone() Storage {
	if s.S3 != nil {
		own := *s.S3
		s.S3 = &own
	}
	return s
}

// Equal says whether both are the same, keys included.
func (s Storage) Equal(o Storage) bool {
	a, b := s, o
	a.S3, b.S3 = nil, nil
	if a != b || (s.S3 == nil) != (o.S3 == nil) {
		return false
	}
	return s.S3 == nil || *s.S3 == *o.S3
}

func (s *Storage) hideSecrets() {
	if s.S3 != nil {
		s.S3.SecretAccessKey = ""
	}
}

// MountState says how the mount of a session's bucket is; empty: there is none.
type MountState string

// The states of a mount.
const (
	MountMounted    MountState = "MOUNTED"
	MountRemounting MountState = "REMOUNTING"
	MountFailed     MountState = "MOUNT_FAILED"
)

// StorageStatus is how far a session is saved, as its node says.
type StorageStatus struct {
	Checkpoint   *Checkpoint `json:"checkpoint,omitempty"` // the newest; nil: there is none
	UnsavedSince time.Time   `json:"unsaved_since,omitzero"`
	Message      string      `json:"message,omitempty"`
	MountState   MountState  `json:"mount_state,omitempty"`
	Mounter      string      `json:"mounter,omitempty"`
}

// Checkpoint is one consistent point of a session in object storage.
type Checkpoint struct {
	ID              string    `json:"id"`
	Time            time.Time `json:"time"`
	Trigger         string    `json:"trigger,omitempty"`
	Files           int64     `json:"files,omitempty"`
	Bytes           int64     `json:"bytes,omitempty"`
	UploadedBytes   int64     `json:"uploaded_bytes,omitempty"`
	OpenCodeVersion string    `json:"opencode_version,omitempty"`
	Generation      uint64    `json:"generation,omitempty"`
	Node            string    `json:"node,omitempty"`
	Notes           []string  `json:"notes,omitempty"`
}

// Clone returns a copy that shares nothing with s; nil stays nil.
func (s *StorageStatus) Clone() *StorageStatus {
	if s == nil {
		return nil
	}
	c := *s
	if s.Checkpoint != nil {
		p := *s.Checkpoint
		p.Notes = slices.Clone(p.Notes)
		c.Checkpoint = &p
	}
	return &c
}

// compare says what telling of n after s is worth: that a session was saved once
// more is progress, that it cannot be saved is an event.
func (s *StorageStatus) compare(n *StorageStatus) Outcome {
	a, b := s.Clone(), n.Clone()
	if a == nil {
		a = &StorageStatus{}
	}
	if b == nil {
		b = &StorageStatus{}
	}
	switch {
	case !a.UnsavedSince.Equal(b.UnsavedSince), a.Message != b.Message, a.MountState != b.MountState, a.Mounter != b.Mounter:
		return Changed
	case (a.Checkpoint == nil) != (b.Checkpoint == nil), a.Checkpoint != nil && a.Checkpoint.ID != b.Checkpoint.ID:
		return Progressed
	}
	return Unchanged
}
