// Package storage is the server's use of object storage: it decides where a new
// session is kept and checks that, gives nodes what they need for it, and reads,
// forks, recovers and removes what is there.
//
//	s := storage.New(storage.Config{Store: db, Profiles: profiles, Logger: log})
//	go s.Run(ctx)   // settles deleted sessions and collects garbage; ends and waits with ctx
//	defer s.Close() // after all calls
//
// Errors have the code and reason that the API answers with, and say in words what
// is wrong with keys, bucket or region. Keys are in none of them.
package storage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	conf "github.com/cloudcode-dev/cloudcode/internal/storage"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

const (
	checkFor   = time.Minute      // a check that went well holds for so long
	checkBound = 10 * time.Second // and takes at most that
	maxOpen    = 128              // buckets that are kept open
)

// Config of a Storage. Store is needed.
type Config struct {
	Store    store.Store
	Profiles *conf.Profiles // nil: there are none
	// Own says what buckets sessions may bring; empty: public ones. Those that have one
	// keep it, as if it were OwnPublic, when it becomes OwnDeny.
	Own    conf.OwnPolicy
	Logger *slog.Logger

	// Open and Check stand in for the object store in tests; nil: the real ones. Check
	// also returns the region.
	Open  func(conf.Config) (objstore.Store, error)
	Check func(context.Context, conf.Config) (region string, err error)
}

// Storage knows the server's object storage.
type Storage struct {
	config Config
	log    *slog.Logger
	gc     *collector

	mu   sync.Mutex
	open map[bucketKey]*bucket
	uses uint64
}

// New returns a Storage; it asks no object store yet.
func New(c Config) *Storage {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Own == "" {
		c.Own = conf.OwnPublic
	}
	if c.Open == nil {
		c.Open = conf.Open
	}
	if c.Check == nil {
		c.Check = checkAndFind
	}
	s := &Storage{config: c, log: c.Logger, open: map[bucketKey]*bucket{}}
	s.gc = newCollector(s)
	return s
}

// Close gives up connections. Call it after Run has ended.
func (s *Storage) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, b := range s.open {
		errs = append(errs, objstore.Close(b.store))
	}
	clear(s.open)
	return errors.Join(errs...)
}

// Run settles deleted sessions with their object storage and collects garbage,
// until ctx ends. The error says that the store has been closed.
func (s *Storage) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.gc.run(ctx) })
	err := s.settleAll(ctx)
	cancel()
	return err
}

// bucketKey is what makes two configurations the same.
type bucketKey struct {
	endpoint, bucket, id, secret, region, root, key string
	pathStyle, own                                  bool
}

func keyOf(c conf.Config) bucketKey {
	return bucketKey{c.Endpoint, c.Bucket, c.AccessKeyID, c.SecretAccessKey, c.Region, c.Root, string(c.EncryptionKey), c.PathStyle, c.Own}
}

// bucket is one open root.
type bucket struct {
	config conf.Config
	store  objstore.Store // below the root
	repo   *checkpoint.Repository
	used   uint64 // guarded by Storage.mu

	checking chan struct{} // holds the right to check, and guards the rest
	checked  time.Time     // when that went well
	region   string        // as the check found it
}

// openBucket returns the root of a configuration. It asks for nothing yet.
func (s *Storage) openBucket(c conf.Config) (*bucket, error) {
	c = s.restrict(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.uses++
	key := keyOf(c)
	if b := s.open[key]; b != nil {
		b.used = s.uses
		return b, nil
	}
	below, err := s.config.Open(c)
	if err != nil {
		return nil, words(c, err)
	}
	repo, err := checkpoint.Open(below, "", c.EncryptionKey)
	if err != nil {
		return nil, words(c, err)
	}
	b := &bucket{config: c, store: below, repo: repo, used: s.uses, checking: make(chan struct{}, 1)}
	s.open[key] = b
	s.closeOldest()
	return b, nil
}

// closeOldest bounds what is open: sessions may each bring a bucket of their own.
// A store that was closed can still be used by those who have it. s.mu is held.
func (s *Storage) closeOldest() {
	if len(s.open) <= maxOpen {
		return
	}
	var oldest bucketKey
	found := false
	for k, b := range s.open {
		if !found || b.used < s.open[oldest].used {
			oldest, found = k, true
		}
	}
	if err := objstore.Close(s.open[oldest].store); err != nil {
		s.log.Warn("cannot close an object store", "storage", s.open[oldest].config, "error", err)
	}
	delete(s.open, oldest)
}

// check asks whether the bucket can be used, unless that was so a moment ago, and
// returns its region. Those who ask at the same time share one check.
func (s *Storage) check(ctx context.Context, b *bucket) (region string, err error) {
	ctx, cancel := bound(ctx, checkBound)
	defer cancel()
	select {
	case b.checking <- struct{}{}:
	case <-ctx.Done():
		return "", explain(ctx, b.config, ctx.Err())
	}
	defer func() { <-b.checking }()
	if time.Since(b.checked) < checkFor {
		return b.region, nil
	}
	b.region, err = s.config.Check(ctx, b.config)
	if err != nil {
		return "", explain(ctx, b.config, err)
	}
	b.checked = time.Now()
	return b.region, nil
}

func checkAndFind(ctx context.Context, c conf.Config) (string, error) {
	if err := conf.Check(ctx, c, true); err != nil {
		return "", err
	}
	return conf.ResolveRegion(ctx, c)
}

// bound is for what somebody waits for. See explain.
func bound(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, slowError(d))
}

// slowError says that a bound of our own has ended something.
type slowError time.Duration

func (e slowError) Error() string { return fmt.Sprintf("no answer within %v", time.Duration(e)) }

// explain is words, where a bound of our own may be what ended it.
func explain(ctx context.Context, c conf.Config, err error) error {
	var slow slowError
	if err != nil && errors.As(context.Cause(ctx), &slow) {
		err = fmt.Errorf("%w: %w", objstore.ErrUnavailable, slow)
	}
	return words(c, err)
}

// of returns what leads to a session's object storage.
func (s *Storage) of(st fleet.Storage) (conf.Config, error) {
	switch {
	case !st.Remote():
		return conf.Config{}, grpcerr.New(codes.FailedPrecondition, ReasonLocal, "the session is kept on the disk of its node alone (storage mode LOCAL): there are no checkpoints of it")
	case st.S3 != nil:
		return own(*st.S3), nil
	}
	c, ok := s.config.Profiles.Get(st.Profile)
	if !ok {
		return conf.Config{}, grpcerr.New(codes.FailedPrecondition, ReasonNotConfigured, "the session is kept in storage profile %q, which this server was started without: give it its keys again", st.Profile)
	}
	if c.Bucket != st.Bucket || c.Root != st.Root {
		return conf.Config{}, grpcerr.New(codes.FailedPrecondition, ReasonNotConfigured, "storage profile %q leads to %s, and the session is kept in %s: let the profile lead there again, and use another one for new sessions", st.Profile, c.URI(""), st.URI())
	}
	return c, nil
}

// own is the object storage of a session's own. Its checkpoints are not encrypted.
func own(o fleet.S3) conf.Config {
	return conf.Config{
		Own:      true,
		Endpoint: o.Endpoint, Bucket: o.Bucket, AccessKeyID: o.AccessKeyID, SecretAccessKey: o.SecretAccessKey,
		Region: o.Region, PathStyle: o.PathStyle, Root: o.Prefix, TigrisFSArgs: o.TigrisFSArgs,
	}
}

// restrict says what a bucket of a session's own may lead to.
func (s *Storage) restrict(c conf.Config) conf.Config {
	c.PublicOnly = c.Own && s.config.Own != conf.OwnAny
	return c
}

// Session returns the checkpoints of a session.
func (s *Storage) Session(st fleet.Storage) (*Session, error) {
	c, err := s.of(st)
	if err != nil {
		return nil, err
	}
	b, err := s.openBucket(c)
	if err != nil {
		return nil, err
	}
	return &Session{config: c, bucket: b, inner: b.repo.Session(st.Prefix), prefix: st.Prefix}, nil
}

// Assigned implements dispatch.Storage.
func (s *Storage) Assigned(st fleet.Storage) *nodev1.AssignedStorage {
	out := &nodev1.AssignedStorage{Mode: protoconv.StorageMode(st.Mode), Prefix: st.Prefix}
	c, err := s.of(st)
	if err != nil {
		s.log.Error("a node cannot be given the keys of a session", "storage", st.URI(), "error", err)
		return out
	}
	out.Endpoint, out.Bucket, out.AccessKeyId, out.SecretAccessKey = c.Endpoint, c.Bucket, c.AccessKeyID, c.SecretAccessKey
	out.Region, out.PathStyle, out.Root = region(c.Region, st.Region), c.PathStyle, c.Root
	out.TigrisfsArgs, out.EncryptionKey = c.TigrisFSArgs, c.EncryptionKey
	c = s.restrict(c)
	out.Own, out.PublicOnly = c.Own, c.PublicOnly
	return out
}

// region is the configured one, or what was found out for `auto`.
func region(configured, found string) string {
	switch {
	case configured != "" && configured != conf.RegionAuto:
		return configured
	case found != "":
		return found
	}
	return conf.RegionAuto
}
