package api

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// wanted is what a user can set.
type wanted struct {
	labels map[string]string
	spec   fleet.Spec
}

// fields are the paths that an update mask can name; each copies one field.
var fields = map[string]func(dst, src *wanted){
	"labels":                      func(d, s *wanted) { d.labels = s.labels },
	"spec.image":                  func(d, s *wanted) { d.spec.Image = s.spec.Image },
	"spec.env":                    func(d, s *wanted) { d.spec.Env = s.spec.Env },
	"spec.opencode_config":        func(d, s *wanted) { d.spec.OpenCodeConfig = s.spec.OpenCodeConfig },
	"spec.resources.cpu_millis":   func(d, s *wanted) { d.spec.Resources.CPUMillis = s.spec.Resources.CPUMillis },
	"spec.resources.memory_bytes": func(d, s *wanted) { d.spec.Resources.MemoryBytes = s.spec.Resources.MemoryBytes },
	"spec.resources.pids":         func(d, s *wanted) { d.spec.Resources.PIDs = s.spec.Resources.PIDs },
	"spec.resources.disk_bytes":   func(d, s *wanted) { d.spec.Resources.DiskBytes = s.spec.Resources.DiskBytes },
	"spec.node_selector":          func(d, s *wanted) { d.spec.NodeSelector = s.spec.NodeSelector },

	// Where a session is kept is decided when it is made. Keys can be renewed; empty
	// ones were left out, as what the API shows leaves them out.
	"spec.storage.s3.access_key_id": func(d, s *wanted) {
		renew(d, s, func(k *fleet.S3) *string { return &k.AccessKeyID })
	},
	"spec.storage.s3.secret_access_key": func(d, s *wanted) {
		renew(d, s, func(k *fleet.S3) *string { return &k.SecretAccessKey })
	},
}

func renew(d, s *wanted, key func(*fleet.S3) *string) {
	if s.spec.Storage.S3 == nil || *key(s.spec.Storage.S3) == "" {
		return
	}
	if d.spec.Storage.S3 == nil {
		d.spec.Storage.S3 = &fleet.S3{}
	}
	*key(d.spec.Storage.S3) = *key(s.spec.Storage.S3)
}

// carriers are fields of the request that say which session is meant. HTTP
// clients have them in the body, and so in the mask.
var carriers = []string{"name", "etag"}

// maskFields returns the fields that a mask names.
func maskFields(v *violations, mask *fieldmaskpb.FieldMask, sess *cloudcodev1.Session) []string {
	paths := mask.GetPaths()
	if len(paths) == 0 {
		return setFields(sess)
	}
	var out []string
	for _, path := range paths {
		switch {
		case path == "*":
			if len(paths) > 1 {
				v.add("update_mask", "`*` must stand alone")
			}
			out = append(out, slices.Sorted(maps.Keys(fields))...)
			continue
		case slices.Contains(carriers, path):
			continue
		}
		found := false
		for field := range fields {
			if field == path || strings.HasPrefix(field, path+".") {
				out, found = append(out, field), true
			}
		}
		switch {
		case found:
		case strings.HasPrefix(path, "spec.storage."):
			v.add("update_mask", fmt.Sprintf("%q cannot be changed after the session was made: only the keys in spec.storage.s3 can", path))
		case outputOnly(path):
			v.add("update_mask", fmt.Sprintf("%q is derived and cannot be set", path))
		default:
			v.add("update_mask", fmt.Sprintf("there is no field %q; those that can be set are %s", path, strings.Join(slices.Sorted(maps.Keys(fields)), ", ")))
		}
	}
	return out
}

// outputOnly says whether a path begins with a field of the session that cannot
// be set.
func outputOnly(path string) bool {
	first, _, _ := strings.Cut(path, ".")
	known := (&cloudcodev1.Session{}).ProtoReflect().Descriptor().Fields()
	return first != "labels" && first != "spec" && known.ByName(protoreflect.Name(first)) != nil
}

// setFields returns the fields that are set in a session.
func setFields(sess *cloudcodev1.Session) []string {
	src := fromProto(sess)
	var out []string
	for field, copyField := range fields {
		var dst wanted
		copyField(&dst, &src)
		if len(dst.labels) > 0 || !dst.spec.Equal(fleet.Spec{}) {
			out = append(out, field)
		}
	}
	return out
}

func fromProto(sess *cloudcodev1.Session) wanted {
	w := wanted{labels: protoconv.Map(sess.GetLabels()), spec: protoconv.SpecFromProto(sess.GetSpec())}
	w.spec.Storage.S3 = protoconv.S3FromProto(sess.GetSpec().GetStorage().GetS3())
	return w
}

// validateSameStorage: what a request says of the session's storage must be as it
// is, but for the keys. It may leave out what it does not want to change.
func validateSameStorage(v *violations, have fleet.Storage, asked *cloudcodev1.Storage) {
	const field = "session.spec.storage"
	const fixed = "cannot be changed after the session was made: fork it, or create a new one, and copy what it needs"
	r := protoconv.StorageRequestFromProto(asked)
	if r.Mode != "" && r.Mode != fleet.ModeAuto && r.Mode != have.Mode && (r.Mode != fleet.ModeLocal || have.Mode != "") {
		v.add(field+".mode", fixed)
	}
	if r.Profile != "" && r.Profile != have.Profile {
		v.add(field+".profile", fixed)
	}
	if r.Prefix != nil && *r.Prefix != have.Prefix {
		v.add(field+".prefix", fixed)
	}
	if r.S3 == nil {
		return
	}
	if have.S3 == nil {
		v.add(field+".s3", "the session has no object storage of its own: its keys are those of the server")
		return
	}
	for name, pair := range map[string][2]string{
		"endpoint": {r.S3.Endpoint, have.S3.Endpoint}, "bucket": {r.S3.Bucket, have.S3.Bucket}, "region": {r.S3.Region, have.S3.Region},
		"prefix": {r.S3.Prefix, have.S3.Prefix}, "tigrisfs_args": {r.S3.TigrisFSArgs, have.S3.TigrisFSArgs},
	} {
		if pair[0] != "" && pair[0] != pair[1] {
			v.add(field+".s3."+name, fixed)
		}
	}
}

// UpdateSession implements SessionService.
func (s *Sessions) UpdateSession(ctx context.Context, req *cloudcodev1.UpdateSessionRequest) (*cloudcodev1.Session, error) {
	var v violations
	id := resourceID(&v, "session.name", "sessions", req.GetSession().GetName())
	chosen := maskFields(&v, req.GetUpdateMask(), req.GetSession())
	if err := v.err(); err != nil {
		return nil, err
	}
	src := fromProto(req.GetSession())
	all := len(req.GetUpdateMask().GetPaths()) == 0
	storage := all || slices.ContainsFunc(chosen, func(f string) bool { return strings.HasPrefix(f, "spec.storage.") })
	if err := s.checkNewKeys(ctx, req.GetSession().GetName(), chosen, &src); err != nil {
		return nil, err
	}
	var sess *fleet.Session
	_, err := s.config.Store.Update(ctx, func(tx store.Tx) (err error) {
		sess, err = readSession(tx, id)
		if err != nil {
			return err
		}
		if err := checkEtag(sess, req.GetSession().GetEtag()); err != nil {
			return err
		}
		if sess.Deleting {
			return deletingError(id)
		}
		next := wanted{labels: sess.Labels, spec: sess.Spec.Clone()}
		for _, field := range chosen {
			fields[field](&next, &src)
		}
		if next.spec.Image == "" {
			next.spec.Image = s.config.DefaultImage
		}
		var v violations
		if storage {
			validateSameStorage(&v, sess.Spec.Storage, req.GetSession().GetSpec().GetStorage())
		}
		if !maps.Equal(next.labels, sess.Labels) {
			validateLabels(&v, "session.labels", next.labels)
		}
		if !next.spec.Equal(sess.Spec) {
			validateSpec(&v, next.spec)
			validateDisk(&v, sess, next.spec.Resources.DiskBytes)
		}
		if err := v.err(); err != nil {
			return err
		}
		if maps.Equal(next.labels, sess.Labels) && next.spec.Equal(sess.Spec) {
			return nil // nothing changed, and nobody is to be told so
		}
		sess.Labels, sess.Spec = maps.Clone(next.labels), next.spec.Clone()
		sess.UpdateTime = time.Now().UTC()
		return putWithEvent(tx, sess)
	})
	if err != nil {
		return nil, err
	}
	return s.show(sess), nil
}

// checkNewKeys asks the object storage whether new keys are right, before they are
// what the session is kept with.
func (s *Sessions) checkNewKeys(ctx context.Context, name string, chosen []string, src *wanted) error {
	if src.spec.Storage.S3 == nil {
		return nil
	}
	sess, err := s.get(ctx, name)
	if err != nil {
		return err
	}
	next := wanted{spec: sess.Spec.Clone()}
	for _, field := range chosen {
		fields[field](&next, src)
	}
	if sess.Spec.Storage.S3 == nil || next.spec.Storage.Equal(sess.Spec.Storage) {
		return nil
	}
	return s.config.Storage.CheckKeys(ctx, next.spec.Storage)
}

// validateDisk: a disk that was made can grow, and nothing else.
func validateDisk(v *violations, sess *fleet.Session, bytes int64) {
	have := sess.Spec.Resources.DiskBytes
	if sess.Generation == 0 || bytes == have {
		return
	}
	const field = "session.spec.resources.disk_bytes"
	switch {
	case have == 0:
		v.add(field, "the session's disk was made without a limit, and cannot get one later: create a new session")
	case bytes == 0:
		v.add(field, "a limit that was set cannot be taken away; it can grow")
	case bytes < have:
		v.add(field, fmt.Sprintf("a disk cannot shrink: it has %d bytes", have))
	}
}
