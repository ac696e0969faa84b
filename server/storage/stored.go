package storage

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
)

var recordOptions = protojson.MarshalOptions{UseProtoNames: true}

// Stored is a session that is in a bucket.
type Stored struct {
	// SessionID and UID are of the session that had the folder last.
	SessionID, UID string
	// Storage leads to it; its Mode is empty if there is no checkpoint.
	Storage    fleet.Storage
	Generation uint64 // of its last owner
	Time       time.Time
	DeleteTime time.Time
	// Node that had it last; empty: none ever did, it is a fork that was not placed.
	Node string
	// Released: its last owner has saved it and let it go.
	Released   bool
	Checkpoint *fleet.Checkpoint // nil: there is none
	// Labels and Spec as the newest checkpoint keeps them.
	Labels map[string]string
	Spec   fleet.Spec
	// Err says why it cannot be read; then more may be missing.
	Err error
}

// Stored yields the sessions that are in a profile's bucket, by prefix. An error
// beside one ends the listing.
func (s *Storage) Stored(ctx context.Context, profile string) iter.Seq2[Stored, error] {
	return func(yield func(Stored, error) bool) {
		c, err := s.Profile(profile)
		if err != nil {
			yield(Stored{}, err)
			return
		}
		b, err := s.openBucket(c)
		if err != nil {
			yield(Stored{}, err)
			return
		}
		region, err := s.check(ctx, b)
		if err != nil {
			yield(Stored{}, err)
			return
		}
		for found, err := range b.repo.Sessions(ctx) {
			if err != nil {
				yield(Stored{}, words(c, err))
				return
			}
			out := stored(c, found)
			out.Storage.Profile, out.Storage.Region = profile, region
			if !yield(out, nil) {
				return
			}
		}
	}
}

func stored(c conf.Config, found checkpoint.Stored) Stored {
	h := found.Head
	out := Stored{
		SessionID: h.Owner.SessionID, UID: h.Owner.SessionUID, Generation: h.Owner.Generation, Node: h.Owner.Node, Time: h.Time, DeleteTime: h.DeleteTime, Released: h.Released,
		Storage: fleet.Storage{Prefix: found.Prefix, Endpoint: c.Endpoint, Bucket: c.Bucket, Root: c.Root}, Err: words(c, found.Err),
	}
	m := found.Manifest
	if m == nil {
		return out
	}
	out.Storage.Mode, out.Checkpoint = modeOf(m.Mode), describe(m.Info)
	record := &cloudcodev1.Session{}
	// A newer version may have kept more.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(m.SessionJSON, record); err != nil {
		out.Err = errors.Join(out.Err, fmt.Errorf("checkpoint %s says of what session it is in a way that cannot be read: %w", m.ID, err))
		return out
	}
	out.Labels, out.Spec = protoconv.Map(record.GetLabels()), protoconv.SpecFromProto(record.GetSpec())
	return out
}

// SamePlace says whether two sessions are kept in the same folder.
func SamePlace(a, b fleet.Storage) bool {
	place := func(s fleet.Storage) conf.Config { return conf.Config{Endpoint: s.Endpoint, Bucket: s.Bucket} }
	return a.Remote() && b.Remote() && conf.SameBucket(place(a), place(b)) && conf.Join(a.Root, a.Prefix) == conf.Join(b.Root, b.Prefix)
}
