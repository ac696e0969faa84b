package api

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/storage"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const profilesCollection = "storageProfiles"

// ListStorageProfiles implements StorageService.
func (s *Storages) ListStorageProfiles(context.Context, *cloudcodev1.ListStorageProfilesRequest) (*cloudcodev1.ListStorageProfilesResponse, error) {
	profiles := s.sessions.config.Storage.Profiles()
	resp := &cloudcodev1.ListStorageProfilesResponse{}
	for _, name := range profiles.Names() {
		c, _ := profiles.Get(name)
		message := ""
		if err := s.sessions.config.Storage.Uncollected(c); err != nil {
			message = "Data that no checkpoint needs is not deleted: " + status.Convert(err).Message()
		}
		resp.StorageProfiles = append(resp.StorageProfiles, &cloudcodev1.StorageProfile{
			Name: profilesCollection + "/" + name, Endpoint: c.Endpoint, Bucket: c.Bucket, Region: c.Region, PathStyle: c.PathStyle,
			Prefix: c.Root, Encrypted: len(c.EncryptionKey) > 0, AutoMode: protoconv.StorageMode(storage.AutoMode(c)), Message: message,
		})
	}
	return resp, nil
}

// stored returns what is in a profile's bucket, and the sessions that the fleet
// has in object storage.
func (s *Storages) stored(ctx context.Context, parent string) (found []storage.Stored, have []*fleet.Session, err error) {
	var v violations
	profile := resourceID(&v, "parent", profilesCollection, parent)
	if err := v.err(); err != nil {
		return nil, nil, err
	}
	for st, err := range s.sessions.config.Storage.Stored(ctx, profile) {
		if err != nil {
			return nil, nil, err
		}
		found = append(found, st)
	}
	// After the bucket was read: a session that is made meanwhile is known.
	err = s.sessions.config.Store.View(ctx, func(tx store.ReadTx) error {
		have = nil
		for sess, err := range tx.Sessions("") {
			if err != nil {
				return err
			}
			if sess.Spec.Storage.Remote() {
				have = append(have, sess)
			}
		}
		return nil
	})
	return found, have, err
}

func known(st storage.Stored, have []*fleet.Session) bool {
	place := st.Storage
	place.Mode = fleet.ModeSnapshot // any; it is not known without a checkpoint
	return slices.ContainsFunc(have, func(s *fleet.Session) bool { return storage.SamePlace(s.Spec.Storage, place) })
}

// ListStoredSessions implements StorageService.
func (s *Storages) ListStoredSessions(ctx context.Context, req *cloudcodev1.ListStoredSessionsRequest) (*cloudcodev1.ListStoredSessionsResponse, error) {
	found, have, err := s.stored(ctx, req.GetParent())
	if err != nil {
		return nil, err
	}
	resp := &cloudcodev1.ListStoredSessionsResponse{}
	for _, st := range found {
		out := &cloudcodev1.StoredSession{
			SessionId: st.SessionID, Uid: st.UID, Prefix: st.Storage.Prefix, Mode: protoconv.StorageMode(st.Storage.Mode),
			Checkpoint: protoconv.Checkpoint(st.Checkpoint), Known: known(st, have), DeleteTime: protoconv.Time(st.DeleteTime),
		}
		switch {
		case st.Err != nil:
			out.Message = status.Convert(st.Err).Message()
		case st.Checkpoint == nil:
			out.Message = "It was never saved: there is nothing to recover."
		}
		resp.Sessions = append(resp.Sessions, out)
	}
	return resp, nil
}

// RecoverSessions implements StorageService.
func (s *Storages) RecoverSessions(ctx context.Context, req *cloudcodev1.RecoverSessionsRequest) (*cloudcodev1.RecoverSessionsResponse, error) {
	found, have, err := s.stored(ctx, req.GetParent())
	if err != nil {
		return nil, err
	}
	resp := &cloudcodev1.RecoverSessionsResponse{}
	for _, st := range chooseStored(found, have, req.GetSessionIds(), resp) {
		made, err := s.recover(ctx, st)
		if err != nil {
			if ctx.Err() != nil {
				return nil, err
			}
			resp.Failures = append(resp.Failures, failure(st.SessionID, Status(ctx, s.sessions.config.Log, err)))
			continue
		}
		resp.Sessions = append(resp.Sessions, s.sessions.show(made))
	}
	return resp, nil
}

func failure(id string, err error) *cloudcodev1.RecoverFailure {
	return &cloudcodev1.RecoverFailure{SessionId: id, Reason: grpcerr.Reason(err), Message: status.Convert(err).Message()}
}

// chooseStored returns the stored sessions that are meant: those that are named,
// or all that were not deleted and are not here. What is named and cannot be meant is
// put down as a failure.
func chooseStored(found []storage.Stored, have []*fleet.Session, ids []string, resp *cloudcodev1.RecoverSessionsResponse) []storage.Stored {
	var out []storage.Stored
	if len(ids) == 0 {
		for _, st := range found {
			if st.DeleteTime.IsZero() && !known(st, have) && (st.Checkpoint != nil || st.Err != nil) {
				out = append(out, st)
			}
		}
		return out
	}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(ids))) {
		var same []storage.Stored
		for _, st := range found {
			if st.SessionID == id {
				same = append(same, st)
			}
		}
		if len(same) == 0 {
			resp.Failures = append(resp.Failures, failure(id, grpcerr.New(codes.NotFound, reasonSessionNotFound, "no stored session has the id %q", id)))
			continue
		}
		// An id may have been used again, with another prefix: the one that was not
		// deleted, and the newest of those.
		best := slices.MaxFunc(same, func(a, b storage.Stored) int {
			alive := func(st storage.Stored) int {
				if st.DeleteTime.IsZero() {
					return 1
				}
				return 0
			}
			return cmp.Or(cmp.Compare(alive(a), alive(b)), a.Time.Compare(b.Time))
		})
		if known(best, have) {
			resp.Failures = append(resp.Failures, failure(id, grpcerr.New(codes.AlreadyExists, reasonSessionExists, "%s is that of a session of this fleet: there is nothing to recover", best.Storage.URI())))
			continue
		}
		out = append(out, best)
	}
	return out
}

// recover makes the session again that a bucket has. It keeps its uid: it is the same.
func (s *Storages) recover(ctx context.Context, st storage.Stored) (*fleet.Session, error) {
	switch {
	case st.Err != nil && grpcerr.Reason(st.Err) == "":
		return nil, grpcerr.New(codes.FailedPrecondition, storage.ReasonDamaged, "%s", st.Err)
	case st.Err != nil:
		return nil, st.Err
	case st.Checkpoint == nil:
		return nil, grpcerr.New(codes.FailedPrecondition, storage.ReasonNoCheckpoint, "%s was never saved: there is nothing to recover", st.Storage.Prefix)
	}
	spec := st.Spec.Clone()
	spec.Storage = st.Storage
	if spec.Image == "" {
		spec.Image = s.sessions.config.DefaultImage
	}
	var v violations
	validateID(&v, st.SessionID)
	validateLabels(&v, "session.labels", st.Labels)
	validateSpec(&v, spec)
	if err := v.err(); err != nil {
		return nil, err
	}
	made := newSession(st.SessionID, st.Labels, spec)
	if uuid.Validate(st.UID) == nil {
		made.UID = st.UID
	}
	made.Generation, made.OpenCodeVersion = st.Generation, st.Checkpoint.OpenCodeVersion
	made.Storage = &fleet.StorageStatus{Checkpoint: st.Checkpoint}
	// What was let go of and not deleted was suspended; but a fork that was never
	// placed is let go of, too.
	if st.Released && st.DeleteTime.IsZero() && st.Node != "" {
		if err := made.Suspend(time.Now().UTC()); err != nil {
			return nil, fmt.Errorf("recover session %s: %w", st.SessionID, err)
		}
	}
	return s.sessions.insert(ctx, made, "", "")
}
