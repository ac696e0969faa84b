package storage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// Resolved is where a new session is kept.
type Resolved struct {
	Storage fleet.Storage
	// Generation of the last owner of a folder that was there before: the first
	// one of this session must be higher. 0: there was none.
	Generation uint64
}

// Resolve decides where a session that has this id is kept, and checks that it can
// be. It has no side effect that lasts. Whether another session has the folder is
// asked in the transaction that stores this one: see InUse.
func (s *Storage) Resolve(ctx context.Context, id string, r protoconv.StorageRequest) (Resolved, error) {
	if r.S3 != nil {
		o := *r.S3
		o.Endpoint, o.Prefix = strings.TrimRight(o.Endpoint, "/"), strings.Trim(o.Prefix, "/")
		r.S3 = &o
	}
	c, profile, err := s.choose(r)
	if err != nil {
		return Resolved{}, err
	}
	if c == nil {
		return Resolved{Storage: fleet.Storage{Mode: fleet.ModeLocal}}, nil
	}
	st := fleet.Storage{
		Mode: r.Mode, Profile: profile, Prefix: id,
		Endpoint: c.Endpoint, Bucket: c.Bucket, Root: c.Root, S3: r.S3,
	}
	if r.Prefix != nil {
		st.Prefix = *r.Prefix
	}
	out, err := s.resolveIn(ctx, *c, st)
	if r.S3 != nil && status.Code(err) == codes.FailedPrecondition {
		// What it asks for can never be had, whatever the server's state.
		err = grpcerr.New(codes.InvalidArgument, grpcerr.Reason(err), "session.spec.storage.s3: %s", status.Convert(err).Message())
	}
	return out, err
}

// choose returns the object storage that a request means; nil: none, the session
// is local.
func (s *Storage) choose(r protoconv.StorageRequest) (c *conf.Config, profile string, err error) {
	asked := r.Mode == fleet.ModeMount || r.Mode == fleet.ModeSnapshot || r.Prefix != nil
	switch {
	case r.Mode == fleet.ModeLocal:
		return nil, "", nil
	case r.S3 != nil:
		if s.config.Own == conf.OwnDeny {
			return nil, "", grpcerr.New(codes.InvalidArgument, ReasonNotAllowed, "session.spec.storage.s3: this server takes no buckets of sessions' own (it is started with --own-storage=%s): leave it out, or name a storage profile", conf.OwnDeny)
		}
		o := own(*r.S3)
		if err := o.Validate(); err != nil {
			return nil, "", grpcerr.New(codes.InvalidArgument, ReasonIncomplete, "session.spec.storage.s3: %s", err)
		}
		return &o, "", nil
	}
	profile = r.Profile
	if profile == "" {
		profile = conf.DefaultProfile
	}
	p, err := s.Profile(profile)
	switch {
	case err == nil:
		return &p, profile, nil
	case r.Profile == "" && !asked:
		return nil, "", nil // other profiles have to be named
	case r.Profile == "":
		return nil, "", grpcerr.New(codes.FailedPrecondition, ReasonNotConfigured, "the server has no object storage of its own: start it with %s and the other variables, name a storage profile, or give the session its own in spec.storage.s3", conf.EnvEndpoint)
	}
	return nil, "", err
}

// Profile returns a profile's configuration. Returns NOT_FOUND.
func (s *Storage) Profile(name string) (conf.Config, error) {
	c, ok := s.config.Profiles.Get(name)
	if !ok {
		have := "there are none"
		if names := s.config.Profiles.Names(); len(names) > 0 {
			have = "there are " + strings.Join(names, ", ")
		}
		return conf.Config{}, grpcerr.New(codes.NotFound, ReasonNoProfile, "there is no storage profile %q: %s", name, have)
	}
	return c, nil
}

// Profiles returns all of them; it may be nil.
func (s *Storage) Profiles() *conf.Profiles { return s.config.Profiles }

// AutoMode is what AUTO becomes for a new folder.
func AutoMode(c conf.Config) fleet.StorageMode {
	if conf.IsTigris(c.Endpoint) && !c.PublicOnly {
		return fleet.ModeMount
	}
	return fleet.ModeSnapshot
}

func (s *Storage) resolveIn(ctx context.Context, c conf.Config, st fleet.Storage) (Resolved, error) {
	b, err := s.openBucket(c)
	if err != nil {
		return Resolved{}, err
	}
	region, err := s.check(ctx, b)
	if err != nil {
		return Resolved{}, err
	}
	ctx, cancel := bound(ctx, checkBound)
	defer cancel()
	out, err := inspect(ctx, b, st)
	if grpcerr.Reason(err) == ReasonPrefixInUse {
		// If that is a session of our own, that is what is to be said.
		probe := st
		probe.Mode = fleet.ModeSnapshot // it may not be known yet
		if ours := s.config.Store.View(ctx, func(tx store.ReadTx) error { return InUse(tx, probe) }); ours != nil {
			err = ours
		}
	}
	if err != nil {
		return Resolved{}, explain(ctx, c, err)
	}
	if err := mountable(b.config, out.Storage); err != nil {
		return Resolved{}, err
	}
	out.Storage.Region = region
	return out, nil
}

// mountable refuses to mount what may lead anywhere: a mounter looks names up by
// itself, and what it connects to the session's processes can read as files.
func mountable(c conf.Config, st fleet.Storage) error {
	if !c.PublicOnly || st.Mode != fleet.ModeMount {
		return nil
	}
	return grpcerr.New(codes.FailedPrecondition, ReasonNotAllowed, "%s is a bucket of the session's own and would have to be mounted, which this server does not allow: take mode %s and another prefix, or start the server with --own-storage=%s", st.URI(), fleet.ModeSnapshot, conf.OwnAny)
}

// inspect looks into the session's folder. What has checkpoints goes on in the
// mode that they were made in: those of a mount do not hold the workspace.
func inspect(ctx context.Context, b *bucket, st fleet.Storage) (Resolved, error) {
	out := Resolved{Storage: st}
	if st.Prefix != "" {
		root, err := conf.IsRoot(ctx, b.store, st.Prefix)
		if err != nil {
			return out, err
		}
		if root {
			return out, grpcerr.New(codes.FailedPrecondition, ReasonPrefixInUse, "%s cannot be used: checkpoints of other sessions are kept below it, which this one would see. Choose another spec.storage.prefix", b.config.URI(st.Prefix))
		}
	}
	sess := b.repo.Session(st.Prefix)
	head, err := sess.Head(ctx)
	switch {
	case errors.Is(err, checkpoint.ErrNotFound):
	case err != nil:
		return out, err
	default:
		if err := free(b.config, st, head); err != nil {
			return out, err
		}
		out.Generation = head.Owner.Generation
	}
	auto := st.Mode == "" || st.Mode == fleet.ModeAuto
	if head.Manifest != "" {
		m, err := sess.Manifest(ctx, head.Manifest)
		if err != nil {
			return out, err
		}
		made := modeOf(m.Mode)
		if auto {
			out.Storage.Mode = made
		} else if made != st.Mode {
			return out, grpcerr.New(codes.FailedPrecondition, ReasonOtherMode, "%s holds checkpoints of mode %s: leave the mode out to go on with them, or choose another prefix", st.URI(), made)
		}
		return out, nil
	}
	if !auto {
		return out, nil
	}
	out.Storage.Mode = AutoMode(b.config)
	if out.Storage.Mode == fleet.ModeSnapshot {
		original, err := conf.WrittenByOriginal(ctx, b.store, st.Prefix)
		if err != nil {
			return out, err
		}
		if original {
			out.Storage.Mode = fleet.ModeMount
		}
	}
	return out, nil
}

// free returns FAILED_PRECONDITION unless what had the folder has let go of it. Another
// server may run it, and would lose it to a new session.
func free(c conf.Config, st fleet.Storage, head checkpoint.Head) error {
	o := head.Owner
	uri := c.URI(st.Prefix)
	var how string
	switch {
	case !head.Released && !head.DeleteTime.IsZero():
		how = fmt.Sprintf("session %q, which had it, is being deleted with all that is in it: try again when that is done", o.SessionID)
	case !head.Released:
		how = fmt.Sprintf("it belongs to session %q, which has not let go of it since %s. If another server runs that, choose another spec.storage.prefix; if it is all that is left of a lost server, bring it back with `cloudcode session recover %s`", o.SessionID, head.Time.UTC().Format(time.RFC3339), o.SessionID)
	case o.Node == "" && head.DeleteTime.IsZero():
		how = fmt.Sprintf("it was filled for session %q, a fork, which is being made or was never finished: choose another spec.storage.prefix, or bring it back with `cloudcode session recover %s`", o.SessionID, o.SessionID)
	default:
		return nil
	}
	return grpcerr.New(codes.FailedPrecondition, ReasonPrefixInUse, "%s cannot be used: %s", uri, how)
}

// modeOf a checkpoint.
func modeOf(mode string) fleet.StorageMode {
	if mode == string(fleet.ModeMount) {
		return fleet.ModeMount
	}
	return fleet.ModeSnapshot
}

// InUse returns FAILED_PRECONDITION if another session has a folder, or one that
// overlaps with it. Those that are being deleted count: their nodes still write.
func InUse(tx store.ReadTx, st fleet.Storage) error {
	if !st.Remote() {
		return nil
	}
	place := func(s fleet.Storage) conf.Config {
		return conf.Config{Endpoint: s.Endpoint, Bucket: s.Bucket, Root: s.Root}
	}
	for other, err := range tx.Sessions("") {
		if err != nil {
			return err
		}
		o := other.Spec.Storage
		if !o.Remote() || !conf.FoldersOverlap(place(st), st.Prefix, place(o), o.Prefix) {
			continue
		}
		how := "has that folder"
		if st.URI() != o.URI() {
			how = "has " + o.URI() + ", which is inside it or around it"
		}
		if other.Deleting {
			how += " and is still being deleted: try again when it is gone"
		} else {
			how += ": choose another spec.storage.prefix"
		}
		return grpcerr.New(codes.FailedPrecondition, ReasonPrefixInUse, "%s cannot be used: session %q %s", st.URI(), other.ID, how)
	}
	return nil
}

// CheckKeys asks whether the keys of a session's own object storage are right.
func (s *Storage) CheckKeys(ctx context.Context, st fleet.Storage) error {
	c, err := s.of(st)
	if err != nil {
		return err
	}
	b, err := s.openBucket(c)
	if err != nil {
		return err
	}
	_, err = s.check(ctx, b)
	if status.Code(err) == codes.FailedPrecondition {
		err = grpcerr.New(codes.InvalidArgument, grpcerr.Reason(err), "session.spec.storage.s3: %s", status.Convert(err).Message())
	}
	return err
}
